"""``axolotl mote chat``: a dialogue in the terminal, reasoning dimmed and the answer plain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.chain.steps import ADAPTIVE, VERIFY
from axolotl_mote.cli._options import (
    decoding_options,
    json_option,
    model_options,
    parse_limits,
    sampling_arguments,
    usage_errors,
)
from axolotl_mote.cli.json_output import json_writer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from axolotl_mote.chain.result import Chain

_HELP = """\
/steps adaptive | verify | analysis+response   choose the chain
/reasoning                                     show or hide the reasoning
/reset                                         forget the dialogue
/exit                                          leave (Ctrl-D works too)
A message that begins with / needs a space before it."""

# Characters that a terminal would obey: C0 and C1 controls except newline and tab, and text direction overrides.
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]


@click.command()
@model_options
@click.option(
    "--steps", default=ADAPTIVE, show_default=True, help="adaptive, verify, or a form such as analysis+response."
)
@decoding_options
@click.option("--system", help="System message.")
@click.option("--hide-reasoning", is_flag=True, help="Show the answer only.")
@json_option("One JSON object per answer instead of the display.")
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
    commands. Input may come from a pipe.

    \b
    Examples:
      axolotl mote chat --adapter outputs/mote
      echo "How do I kill a Python process?" | axolotl mote chat --adapter outputs/mote --json
    """
    write_json = json_writer() if as_json else None
    with usage_errors():
        settings = sampling_arguments(**decoding) | {"step_limits": parse_limits(decoding["step_limit"])}
        settings |= {"max_new_tokens": decoding["max_new_tokens"], "check": decoding["check"]}
        settings["seed"] = decoding["seed"] if decoding["sample"] else None
        from axolotl_mote.generation.loading import load_mote

        model, tokenizer = load_mote(adapter, base_model, dtype=dtype, device=device)
        session = ChatSession(
            model, tokenizer, steps, settings, system, show_reasoning=not hide_reasoning, write_json=write_json
        )
    session.run(_lines(quiet=as_json))


def _lines(quiet: bool) -> Iterator[str]:
    """Lines of standard input, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("" if quiet else "\n> ")
        except (EOFError, KeyboardInterrupt):
            return


class ChatSession:
    """A dialogue, and how its answers are shown.

    Args:
        model: From ``load_mote``.
        tokenizer: From ``load_mote``.
        steps: Mode, as on the command line.
        settings: Arguments for ``generate_chain``.
        system: System message, or None.
        show_reasoning: Whether steps before the answer are shown.
        write_json: Takes one object per answer, instead of the display; remarks then go to standard error.
        console: Where to show the dialogue; default: standard output.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        steps: str,
        settings: dict[str, Any],
        system: str | None = None,
        *,
        show_reasoning: bool = True,
        write_json: Callable[[dict[str, Any]], None] | None = None,
        console: Console | None = None,
    ) -> None:
        from rich.console import Console

        from axolotl_mote.generation.loading import codec_for

        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.codec = codec_for(model, tokenizer)
        self.show_reasoning, self.write_json = show_reasoning, write_json
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)
        self.steps: str | list[str] = ADAPTIVE
        self._turns = 0
        self.choose(steps)

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line until the input ends or /exit."""
        if self.write_json is None:
            self.console.print(f"Steps: {', '.join(self.codec.steps)}. /help lists the commands.", style="dim")
        for line in lines:
            text = line.strip()
            name, _, argument = text.partition(" ")
            if name == "/exit":
                return
            if line.startswith("/"):
                self._command(name, argument.strip())
            elif text:
                self._answer(text)

    def choose(self, steps: str) -> None:
        """Set the mode.

        Raises:
            ValueError: If it names steps the adapter does not have.
        """
        from axolotl_mote.generation.runner import check_mode, parse_mode

        chosen = parse_mode(steps)
        check_mode(chosen, self.codec.vocabulary, self.settings["check"])
        self.steps = chosen

    def _command(self, name: str, argument: str) -> None:
        if name == "/help":
            self._say(_HELP)
        elif name == "/reset":
            self.messages = list(self.start)
            self._say("Dialogue reset.")
        elif name == "/reasoning":
            self.show_reasoning = not self.show_reasoning
            self._say(f"Reasoning {'shown' if self.show_reasoning else 'hidden'}.")
        elif name == "/steps":
            try:
                mode = argument or ADAPTIVE
                self.choose(mode)
                self._say(f"Steps: {mode}.")
            except ValueError as error:
                self._say(str(error))
        else:
            self._say(f"{name} is no command. /help lists them; put a space before a message that begins with /.")

    def _answer(self, text: str) -> None:
        from axolotl_mote.generation.api import generate_chain
        from axolotl_mote.generation.streamer import StepStreamer

        self.messages.append({"role": "user", "content": text})
        # Verify mode may reject an answer after it was written: only the final chain is shown.
        streams = self.write_json is None and self.steps != VERIFY
        streamer = StepStreamer(self.codec, self._show) if streams else None
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
            if not sys.stdin.isatty():  # nobody is there to type the next line
                raise
            self.messages.pop()
            self._say("\nStopped; the question was removed from the dialogue.")
            return
        self._turns += 1
        if self.write_json is not None:
            self.write_json({"question": text} | chain.to_row())
        else:
            if streamer is None:
                for step, step_text in chain.texts.items():
                    self._show(step, "")
                    self._show(step, step_text)
            self._close(chain)
        self._remember(chain)

    def _remember(self, chain: Chain) -> None:
        """Add the answer to the dialogue; a blank one leaves it together with its question, as no turn may be blank."""
        if chain.answer.strip():
            self.messages.append(chain.message())
            return
        self.messages.pop()
        self._say("The answer is blank; question and answer were left out of the dialogue.")

    def _show(self, step: str, piece: str) -> None:
        """Print a piece of a step as it is generated; an empty piece opens the step."""
        is_answer = step == self.codec.vocabulary.answer
        if not is_answer and not self.show_reasoning:
            return
        style = None if is_answer else "dim"
        if not piece:
            self.console.print(
                "" if is_answer else f"\n[{step}] ", style=style, end="\n" if is_answer else "", markup=False
            )
            return
        self.console.print(piece.translate(_CONTROLS), style=style, end="", markup=False, highlight=False)

    def _close(self, chain: Chain) -> None:
        """End an answer: its verdict, and a warning if it is unfinished."""
        self.console.print()
        if chain.check:
            self.console.print(f"judged {chain.check}", style="dim" if chain.check == "safe" else "bold red")
        if not chain.finished:
            self.console.print(f"(unfinished: {_why_unfinished(chain)})", style="yellow")

    def _say(self, text: str) -> None:
        if self.write_json is not None:
            click.echo(text, err=True)
        else:
            self.console.print(text, style="dim", markup=False)


def _why_unfinished(chain: Chain) -> str:
    if chain.answer_step in chain.truncated:
        return "the answer was cut at its limit"
    if not chain.valid:
        return "the model broke the form of a chain"
    return "the check is missing" if chain.answer.strip() else "the answer is blank"
