"""``axolotl mote judge``: a judge against human labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.cli._options import json_option, usage_errors
from axolotl_mote.cli.json_output import json_writer

if TYPE_CHECKING:
    from rich.console import Console

    from axolotl_mote.evaluation.agreement import Agreement
    from axolotl_mote.evaluation.judges.refusal import RefusalJudge


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--judge",
    "name",
    default="refusal",
    show_default=True,
    metavar="refusal | WEIGHTS.json",
    help="The refusal judge, with the project's weights or with your own.",
)
@json_option("Print one JSON object instead of tables.")
def command(file: Path, name: str, as_json: bool) -> None:
    """Measure a judge against human labels: agreement, Cohen's kappa, confusion, F1, each with its 95 % interval.

    FILE holds JSON lines with the texts prompt, completion and human_label: full_compliance, partial_refusal or
    full_refusal, or XSTest's 1_full_compliance, 2_full_refusal, 3_partial_refusal. Answers of one prompt (or of one
    prompt_id) are not independent, so intervals draw prompts. No network is used.

    Use answers that the weights were not trained on: the judge fits its own training rows almost perfectly, so
    agreement on those says nothing.

    \b
    Examples:
      axolotl mote judge labelled.jsonl --judge refusal --json
      axolotl mote judge labelled.jsonl --judge my_weights.json
    """
    write_json = json_writer() if as_json else None
    with usage_errors(extra="judge"):
        from axolotl_mote.evaluation.agreement import measure_agreement, read_labelled

        judge = _load(name)
        answers = read_labelled(file)
        verdicts = [judge.judge(answer.prompt, answer.completion)[0] for answer in answers]
        agreement = measure_agreement(answers, verdicts, ["empty" if v is None else "scored" for v in verdicts])
    if write_json is not None:
        write_json({**agreement.as_dict(), "judge": {"name": name, "revision": judge.revision}})
        return
    from rich.console import Console

    _print(agreement, f"{name} {judge.revision}", Console(markup=False))


def _load(name: str) -> RefusalJudge:
    """The judge of a name or of a weights file.

    Raises:
        ValueError: If it is neither.
    """
    from axolotl_mote.evaluation.judges.refusal import RefusalJudge

    if name == "refusal":
        return RefusalJudge.load()
    if not Path(name).is_file():
        raise ValueError(f"--judge must be refusal or a file with weights; got {name}. Correct the name.")
    return RefusalJudge.load(name)


def _print(agreement: Agreement, judge: str, console: Console) -> None:
    from rich.table import Table

    found: dict[str, Any] = agreement.as_dict()
    left_out = "".join(f", {count} {status}" for status, count in found["unscored"].items())
    rates = Table(title=f"{judge}: {found['n']} answers{left_out}")
    for column in ("", "value", "95 % interval"):
        rates.add_column(column, justify="right" if column else "left")
    values = {key: found[key] for key in found if key.startswith(("agreement", "kappa"))}
    values |= {f"f1_{label}": value for label, value in found["f1"].items()}
    for key, value in values.items():
        low, high = found["intervals"].get(key, (None, None))
        interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        rates.add_row(key.replace("_", " "), "-" if value is None else f"{value:.3f}", interval)
    console.print(rates)
    confusion = Table(title="Rows: human. Columns: judge.")
    confusion.add_column("")
    for label in found["confusion_matrix"]:
        confusion.add_column(label.replace("_", " "), justify="right")
    for label, counts in found["confusion_matrix"].items():
        confusion.add_row(label.replace("_", " "), *map(str, counts.values()))
    console.print(confusion)
    if found["unscored"]:
        worst = found["worst_case"]["agreement_binary"]
        console.print(f"If all unscored answers count as disagreement, binary agreement is {worst:.3f}.")
