"""``axolotl mote serve``: `vllm serve` on an exported folder, with the flags that it needs."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from axolotl_mote.cli._options import usage_errors


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", default="mote", show_default=True, help="Name that requests give in `model`.")
@click.option("--dry-run", is_flag=True, help="Print the vllm command and do not start it.")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]...")
def command(name: str, dry_run: bool, folder: Path, flags: tuple[str, ...]) -> None:
    """Serve an exported adapter with vLLM: an OpenAI-compatible server that routes by step.

    DIR is what `axolotl mote export --format vllm` wrote. Everything behind it is passed on to `vllm serve`.

    \b
    Examples:
      axolotl mote serve outputs/served
      axolotl mote serve --name aligned outputs/served --port 8001 --max-model-len 4096
    """
    with usage_errors("serve"):
        from axolotl_mote.serving.command import serve_arguments

        arguments = serve_arguments(folder.resolve(), name, flags)
        if dry_run:
            click.echo(shlex.join(["vllm", "serve", *arguments]))
            return
        from axolotl_mote.serving.compat import check_version

        try:
            check_version()
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    program = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    os.execv(sys.executable, program)  # signals reach the server itself
