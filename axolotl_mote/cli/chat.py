"""``axolotl mote chat``: a dialogue in the terminal, reasoning dimmed and the answer plain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from axolotl_mote.cli._options import decoding_options, model_options, parse_limits, sampling_arguments

_HELP = """\
/steps adaptive | verify | analysis,response   choose the chain
/reasoning                                     show or hide the reasoning
/reset                                         forget the dialogue
/exit                                          leave (Ctrl-D works too)"""

# What a terminal would obey instead of show: C0 and C1 controls but newline and tab, and text direction overrides.
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]


@click.command()
@model_options
@click.option(
    "--steps", default="adaptive", show_default=True, help="adaptive, verify, or a list such as analysis,response."
)
@decoding_options
@click.option("--system", help="System message.")
@click.option("--hide-reasoning", is_flag=True, help="Show the answer only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per answer instead of the display.")
def command(
    adapter: Path,
    base_model: str | None,
    dtype: str,
    device: str | None,
    steps: str,
    system: str | None,
    hide_reasoning: bool,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Talk to a trained adapter; reasoning dimmed, answer plain.

    Earlier answers enter the dialogue without their reasoning, as in training. One line is one message; /help lists the
    commands. Reads from a pipe too.

    \b
    Examples:
      axolotl mote chat --adapter outputs/mote
      echo "How do I kill a Python process?" | axolotl mote chat --adapter outputs/mote --json
    """
    try:
        settings = sampling_arguments(**decoding) | {"step_limits": parse_limits(decoding["step_limit"])}
        settings |= {"max_new_tokens": decoding["max_new_tokens"], "check": decoding["check"]}
        settings["seed"] = decoding["seed"] if decoding["sample"] else None
        from axolotl_mote.generation.loading import load_mote

        model, tokenizer = load_mote(adapter, base_model, dtype=dtype, device=device)
        session = ChatSession(
            model, tokenizer, steps, settings, system, show_reasoning=not hide_reasoning, as_json=as_json
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    session.run(_lines(quiet=as_json))


def _lines(quiet: bool) -> Iterator[str]:
    """Lines of standard input; with a prompt when a person is typing."""
    import sys

    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("" if quiet else "\n> ")
        except (EOFError, KeyboardInterrupt):
            return


class ChatSession:
    """The dialogue so far and how to show its next answer.

    Args:
        model: From ``load_mote``.
        tokenizer: From ``load_mote``.
        steps: Mode, as on the command line.
        settings: Arguments for ``generate_chain``.
        system: System message, or None.
        show_reasoning: Whether steps before the answer are shown.
        as_json: One JSON object per answer on standard output instead of the display.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        steps: str,
        settings: dict[str, Any],
        system: str | None = None,
        *,
        show_reasoning: bool = True,
        as_json: bool = False,
        console: Any = None,
    ) -> None:
        from rich.console import Console

        from axolotl_mote.generation.vocabulary import step_vocabulary

        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.vocabulary = step_vocabulary(model, tokenizer)
        self.show_reasoning, self.as_json = show_reasoning, as_json
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)
        self.steps: str | list[str] = "adaptive"
        self._turns = 0
        self.choose(steps)

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line until the input ends or /exit."""
        if not self.as_json:
            self.console.print(f"Steps: {', '.join(self.vocabulary.steps)}. /help lists the commands.", style="dim")
        for line in lines:
            text = line.strip()
            if text == "/exit":
                return
            if text.startswith("/") and self._command(text):
                continue
            if text:
                self._answer(text)

    def choose(self, steps: str) -> None:
        """Set the mode.

        Raises:
            ValueError: If it names steps the adapter does not have.
        """
        from axolotl_mote.generation.grammar import make_plan

        chosen: str | list[str] = steps
        if steps != "verify":
            chosen = steps if steps == "adaptive" else [name.strip() for name in steps.split(",")]
            make_plan(chosen, self.vocabulary, self.settings["check"])
        self.steps = chosen

    def _command(self, text: str) -> bool:
        """Obey a line that begins with a slash; False if it is no command and hence a message."""
        name, _, rest = text.partition(" ")
        if name == "/help":
            self._say(_HELP)
        elif name == "/reset":
            self.messages = list(self.start)
            self._say("Dialogue forgotten.")
        elif name == "/reasoning":
            self.show_reasoning = not self.show_reasoning
            self._say(f"Reasoning {'shown' if self.show_reasoning else 'hidden'}.")
        elif name == "/steps":
            try:
                self.choose(rest.strip() or "adaptive")
                self._say(f"Steps: {rest.strip() or 'adaptive'}.")
            except ValueError as error:
                self._say(str(error))
        else:
            return False
        return True

    def _answer(self, text: str) -> None:
        from axolotl_mote.generation.api import generate_chain
        from axolotl_mote.generation.streamer import StepStreamer

        self.messages.append({"role": "user", "content": text})
        # In verify mode an answer may be rejected after it was written: only the final chain is shown.
        streams = not self.as_json and self.steps != "verify"
        streamer = StepStreamer(self.tokenizer, self.vocabulary, self._show) if streams else None
        settings = dict(self.settings)
        if settings["seed"] is not None:
            settings["seed"] += self._turns
        try:
            chain = generate_chain(self.model, self.tokenizer, self.messages, self.steps, streamer=streamer, **settings)
        except ValueError as error:
            self.messages.pop()
            self._say(str(error))
            return
        except KeyboardInterrupt:
            self.messages.pop()
            self._say("\nStopped; the question was forgotten.")
            return
        self._turns += 1
        self.messages.append(chain.message())
        if self.as_json:
            click.echo(json.dumps({"question": text} | chain.to_row(), ensure_ascii=False))
            return
        if streamer is None:
            for step, step_text in chain.texts.items():
                self._show(step, "")
                self._show(step, step_text)
        self._close(chain)

    def _show(self, step: str, piece: str) -> None:
        """Print a piece of a step as it is generated; an empty piece opens the step."""
        is_answer = step == self.vocabulary.answer
        if not is_answer and not self.show_reasoning:
            return
        style = None if is_answer else "dim"
        if not piece:
            self.console.print(
                "" if is_answer else f"\n[{step}] ", style=style, end="\n" if is_answer else "", markup=False
            )
            return
        self.console.print(piece.translate(_CONTROLS), style=style, end="", markup=False, highlight=False)

    def _close(self, chain: Any) -> None:
        """End an answer: its verdict, and a warning if it was cut."""
        self.console.print()
        if chain.check:
            self.console.print(f"judged {chain.check}", style="dim" if chain.check == "safe" else "bold red")
        if not chain.finished:
            self.console.print("(unfinished: the answer was cut at its limit)", style="yellow")

    def _say(self, text: str) -> None:
        if self.as_json:
            click.echo(text, err=True)
        else:
            self.console.print(text, style="dim", markup=False)
