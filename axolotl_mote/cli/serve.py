"""``axolotl mote serve``: `vllm serve` on an exported folder, with the flags that it needs."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

import click

from axolotl_mote.cli._options import usage_errors


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", default="mote", show_default=True, help="Name that requests give in `model`.")
@click.option("--dry-run", is_flag=True, help="Print the vllm command and do not start it.")
@click.option("--check", is_flag=True, help="Compare a server's answers with transformers instead of serving on.")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]...")
def command(name: str, dry_run: bool, check: bool, folder: Path, flags: tuple[str, ...]) -> None:
    """Serve an exported adapter with vLLM: an OpenAI-compatible server that routes by step.

    DIR is what `axolotl mote export --format vllm` wrote. Everything behind it is passed on to `vllm serve`.

    With --check, 32 questions go through such a server in every mode, all at once; then the server is stopped, and
    transformers judges the log-probability of every generated token. Status 1 if they do not agree.

    \b
    Examples:
      axolotl mote serve outputs/served
      axolotl mote serve --name aligned outputs/served --port 8001 --max-model-len 4096
      axolotl mote serve --check outputs/served --dtype float32
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
        if check:
            _check(program, name, folder)
            return
    os.execv(sys.executable, program)  # signals reach the server itself


def _check(program: list[str], name: str, folder: Path) -> None:
    """Run the server, ask it, stop it, and judge what it said."""
    import openai
    from rich.console import Console

    from axolotl_mote.serving.check import ask_server, check_table, compare, free_port, running_server
    from axolotl_mote.serving.command import value_of

    console = Console()
    if hidden := [part for part in program if part.startswith(("--uds", "--ssl-"))]:
        raise click.ClickException(f"--check must reach the server over HTTP; got {hidden[0]}. Leave it out.")
    if value_of("--config", program) is not None:
        raise click.ClickException("--check must be given the flags themselves; got --config. Write them out.")
    host = value_of("--host", program) or ""
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # all addresses
    key = value_of("--api-key", program) or os.environ.get("VLLM_API_KEY") or "none"
    if (port := value_of("--port", program)) is None:
        port = str(free_port())
        program = [*program, "--port", port]
    with tempfile.TemporaryDirectory() as scratch, console.status("Starting the server") as status:
        try:
            with running_server(program, int(port), Path(scratch) / "log", host) as url:
                status.update("Asking")
                client = openai.OpenAI(base_url=url, api_key=key, timeout=3600, max_retries=0)
                said = ask_server(client, name, folder)
        except (RuntimeError, openai.OpenAIError) as error:
            raise click.ClickException(str(error)) from error
        status.update("Comparing with transformers")
        report = compare(folder, said, value_of("--dtype", program))
    console.print(check_table(report))
    for fault in report.faults:
        console.print(f"[red]wrong:[/red] {fault}")
    if report.faults:
        raise SystemExit(1)
