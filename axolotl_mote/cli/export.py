"""``axolotl mote export``: plain PEFT adapters, one per step, or one folder for a server that routes by step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_mote.cli._options import json_option, model_options, usage_errors
from axolotl_mote.cli.json_output import json_writer

if TYPE_CHECKING:
    from axolotl_mote.export import ExportReport, ServedReport


@click.command()
@model_options
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--format",
    "form",
    default="peft",
    show_default=True,
    type=click.Choice(["peft", "vllm"]),
    help="peft: one plain adapter per step. vllm: base and adapter for `axolotl-mote serve`.",
)
@click.option("--merge-shared", is_flag=True, help="Add the shared expert to the base model; step adapters get rank r.")
@click.option("--no-base", is_flag=True, help="Write the adapters only.")
@click.option(
    "--probe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL with chains to verify on; default: the model's own chains for three questions.",
)
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the step-routed model.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@json_option("Print the report as JSON.")
def command(
    adapter: Path,
    output: Path,
    base_model: str | None,
    form: str,
    merge_shared: bool,
    no_base: bool,
    dtype: str,
    device: str | None,
    probe: Path | None,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write plain PEFT adapters, one per step, and a base model that can be served.

    With --format vllm it writes a base model and one adapter for `axolotl mote serve`, which routes inside the engine.

    The plain adapters load without this package. Each is compared with the step-routed model, token by token, and the
    largest difference is printed. So is the drift of a server that recomputes the earlier steps under the last adapter.

    \b
    Examples:
      axolotl mote export --adapter outputs/mote --output exported
      axolotl mote export --adapter outputs/mote --output served --format vllm
      axolotl mote export --adapter outputs/mote --output exported --merge-shared --dtype bfloat16
      vllm serve exported/base --enable-lora --max-lora-rank 64 \\
          --lora-modules question=exported/adapters/question response=exported/adapters/response
    """
    write_json = json_writer() if as_json else None
    with usage_errors():
        from axolotl_mote import export

        options: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "verify": not no_verify,
            "probes": _probes(probe, adapter, base_model) if probe else None,
            "overwrite": overwrite,
        }
        report: ExportReport | ServedReport
        if form == "vllm":
            _refuse_with_vllm(merge_shared=merge_shared, no_base=no_base)
            report = export.export_served(adapter, output, base_model, **options)
        else:
            options |= {"merge_shared": merge_shared, "write_base_model": not no_base}
            report = export.export_adapter(adapter, output, base_model, **options)
    if write_json is not None:
        write_json(asdict(report))
    elif isinstance(report, export.ServedReport):
        _show_served(report, output)
    else:
        _show(report, output, no_base)


def _refuse_with_vllm(**used: bool) -> None:
    for name, value in used.items():
        if value:
            raise ValueError(
                f"--{name.replace('_', '-')} must be left out with --format vllm: the server needs the whole adapter "
                "and a base with the marker rows. Remove it."
            )


def _probes(path: Path, adapter: Path, base_model: str | None) -> list[list[int]]:
    """Token ids of the chains of a file.

    Raises:
        ValueError: If it holds no chain, or rows with faults.
    """
    from axolotl_mote.chain.codec import ChainCodec
    from axolotl_mote.chain.rows import check_row
    from axolotl_mote.files import read_jsonl, sound_rows
    from axolotl_mote.generation.folder import base_of, read_mote_config
    from axolotl_mote.generation.loading import load_tokenizer

    config = read_mote_config(adapter)
    codec = ChainCodec(load_tokenizer(adapter, base_of(config, adapter, base_model), config), config.steps)
    message = f"--probe must hold chains; got {{faults}} in {path}."
    rows = sound_rows(read_jsonl(path), message, lambda row: check_row(row, codec.steps))
    probes = [codec.encode_chain(row)["input_ids"] for _, row in rows]
    if not probes:
        raise ValueError(f"--probe must hold at least one chain; got none in {path}. Add rows.")
    return probes


def _show_served(report: ServedReport, output: Path) -> None:
    click.echo(f"adapter of rank {report.rank} (--max-lora-rank {report.served_rank}): {output / 'adapter'}")
    click.echo(f"base model ({report.dtype}): {output / 'base'}")
    if report.verified:
        click.echo(f"largest difference from the step-routed model: {report.largest_difference:.1e}")


def _show(report: ExportReport, output: Path, no_base: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("adapter", "rank", "tokens compared", "largest difference", "drift: KL a token", "same top token")
    for name, entry in report.adapters.items():
        rank = str(entry["rank"]) if entry["rank"] else "none: the base model alone"
        if entry["rank"] != entry["rank_before_padding"]:
            rank += f" ({entry['rank_before_padding']} padded with zeros)"
        drift = entry["drift"]
        table.add_row(
            name,
            rank,
            str(entry["tokens"]),
            "not verified" if entry["difference"] is None else f"{entry['difference']:.1e}",
            "" if drift is None else f"{drift['mean_kl']:.4f}",
            "" if drift is None else f"{drift['same_top']:.1%}",
        )
    console = Console(markup=False)  # folder names are not markup
    console.print(table)
    console.print(f"adapters: {output / 'adapters'}", highlight=False, soft_wrap=True)
    if not no_base:
        console.print(f"base model ({report.dtype}): {output / 'base'}", highlight=False, soft_wrap=True)
    if report.verified:
        console.print(
            f"largest difference from the step-routed model: {report.largest_difference:.1e}", highlight=False
        )
