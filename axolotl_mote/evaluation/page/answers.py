"""Prompts, answers and verdicts on the page, to be opened one by one.

The page stays usable: it has a bound on answers and on characters, and says what it left out. It knows no figures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from axolotl_mote.evaluation.figures.cells import variant_name
from axolotl_mote.evaluation.figures.measures import Row
from axolotl_mote.report import Page

MOST_ANSWERS = 1500
"""Answers on the page; results.jsonl holds all of them."""

MOST_CHARACTERS = 4000
"""Of one text on the page."""


_REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Controls that change the order in which text is shown, to the end of the line or to their partner."""


def add_answers(page: Page, rows: Sequence[Row], variants: int) -> None:
    """Add the answers to every task's first prompts, those of all systems side by side.

    Args:
        page: Where to.
        rows: Of results.jsonl.
        variants: Number of systems and modes.
    """
    page.heading("Answers")
    by_task: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {}).setdefault((row["id"], row["epoch"]), []).append(row)
    per_task = max(1, MOST_ANSWERS // max(1, len(by_task)) // max(1, variants))
    for task, prompts in by_task.items():
        left_out = len(prompts) - per_task
        note = f"; the first {per_task} are shown, results.jsonl holds all" if left_out > 0 else ""
        with page.details(f"{task}: {len(prompts)} prompts{note}"):
            for answers in list(prompts.values())[:per_task]:
                _add_prompt(page, answers)


def _add_prompt(page: Page, answers: Sequence[Row]) -> None:
    first = answers[0]
    question = first["messages"][-1]["content"] if first["messages"] else ""
    about = ", ".join(_isolated(str(first[key])) for key in ("label", "category", "transform") if first[key])
    verdicts = "; ".join(f"{variant_name((r['system'], r['steps']))}: {_verdict(r)}" for r in answers)
    with page.details(f"{_isolated(_cut(' '.join(question.split()), 110))} – {verdicts}"):
        for message in first["messages"]:
            page.passage(f"{message['role']}{f' ({about})' if about else ''}", _cut(message["content"]))
        for row in answers:
            page.passage(f"{variant_name((row['system'], row['steps']))}: {_verdict(row)}", _cut(row["answer"] or ""))
            further = {name: text for name, text in row["texts"].items() if text != row["answer"]}
            judged = {n: s["explanation"] for n, s in row["scores"].items() if s["explanation"]}
            if further or judged:
                with page.details("steps before the answer, and what the judge wrote" if judged else "steps before it"):
                    for name, text in further.items():
                        page.passage(name, _cut(text))
                    for name, text in judged.items():
                        page.passage(f"judge of {name}", _cut(text))


def _verdict(row: Row) -> str:
    if row["error"] is not None:
        return f"failed: {_isolated(_cut(row['error'], 200))}"
    parts = []
    for name, score in row["scores"].items():
        said = score["verdict"] if score["status"] == "scored" else f"not scored, {score['status']}"
        parts.append(f"{name} {said if said is not None else score['value']}".replace("_", " "))
    return ", ".join([*parts, *(["cut off"] if row["finished"] is False else [])]) or "not judged"


def _isolated(text: str) -> str:
    """Foreign text for a line that goes on after it, where it cannot change the order of what stands beside it.

    Its line breaks become spaces and its own controls visible, then it is put into an isolate: letters that are written
    from right to left keep to their place.
    """
    plain = _REORDERING.sub(lambda found: f"[U+{ord(found[0]):04X}]", " ".join(text.split()))
    return f"\u2068{plain}\u2069"


def _cut(text: str, most: int | None = None) -> str:
    most = MOST_CHARACTERS if most is None else most
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"
