"""``axolotl mote ...`` and ``axolotl-mote ...``: one module per command, imported only when that command runs.

The modules, each importing only those before it:

    quiet_imports      silence what libraries print while they are imported
    json_output        --json: nothing but JSON on standard output
    _options           options and errors that several commands share
    build              axolotl mote build
    stats              axolotl mote stats
    doctor             axolotl mote doctor
    generate           axolotl mote generate
    chat               axolotl mote chat
    export             axolotl mote export
    serve              axolotl mote serve
    eval               axolotl mote eval
    judge              axolotl mote judge
    quickstart_report  what the quick start ends with
    quickstart         what `make quickstart` runs around `axolotl train`

Each command module holds one ``click.Command`` named ``command``. Nothing here or at the top of those modules imports
torch, so ``--help`` stays quick.
"""

from __future__ import annotations

from copy import copy
from importlib import import_module
from typing import Any

import click

from axolotl_mote.cli.quiet_imports import silence_imports

_COMMANDS = {
    "build": "Write a chain data set: the model aligns itself on your questions.",
    "stats": "Show amounts, lengths and diversity of a chain data set.",
    "doctor": "Prove a training configuration: routing, masks, packing, saving, processes.",
    "generate": "Answer a file of questions with a trained adapter.",
    "chat": "Talk to a trained adapter; reasoning dimmed, answer plain.",
    "eval": "Measure systems on benchmarks: safety, over-refusal, tokens; with a report.",
    "judge": "Measure a judge against human labels.",
    "export": "Write plain PEFT adapters, one per step, and a servable base model.",
    "serve": "Serve an exported adapter with vLLM, routed by step.",
}


class _LazyGroup(click.Group):
    """A group that lists its commands and their one-line help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"axolotl_mote.cli.{name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)  # what a shell reports for Ctrl-C; click would exit with 1

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _named(command, ctx.command_path), rest

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Command.format_help_text(_named(self, ctx.command_path), ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _named(command: click.Command, program: str) -> click.Command:
    """The command with the program's name, as it was called, in the examples of its help."""
    command = copy(command)
    command.help = (command.help or "").replace("axolotl mote", program)
    return command


@click.group(cls=_LazyGroup, name="mote", context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """MoTE: step-routed LoRA experts trained on self-written reasoning chains.

    \b
    Example, from questions to an aligned model:
      axolotl mote build build.yml
      axolotl train mote.yml
      axolotl mote generate --adapter outputs/mote --input questions.jsonl --output chains.jsonl
    """
    silence_imports()
