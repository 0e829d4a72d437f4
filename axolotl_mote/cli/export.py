"""``axolotl mote export``: plain PEFT adapters, one per step, and a servable base model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from axolotl_mote.export.api import ExportReport


@click.command()
@click.option(
    "--adapter", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="Trained."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--base-model", help="Base model folder or name; default: the one in adapter_config.json.")
@click.option("--merge-shared", is_flag=True, help="Add the shared expert to the base model; step adapters get rank r.")
@click.option("--no-base", is_flag=True, help="Write the adapters only.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Type of the base model on disk.",
)
@click.option("--device", help="Where to verify; default: the first GPU, else the CPU.")
@click.option(
    "--probe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Chains (JSONL) to verify on; default: the model's own chains for three questions.",
)
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the gated model.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    adapter: Path,
    output: Path,
    base_model: str | None,
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

    The adapters load without this package. Each is verified against the step-routed model, token by token, and the
    largest difference is printed; so is the drift of a server that computes earlier steps anew under the last adapter.

    \b
    Examples:
      axolotl mote export --adapter outputs/mote --output exported
      axolotl mote export --adapter outputs/mote --output exported --merge-shared --dtype bfloat16
      vllm serve exported/base --enable-lora --max-lora-rank 64 \\
          --lora-modules question=exported/adapters/question response=exported/adapters/response
    """
    from axolotl_mote.export.api import export_adapter

    try:
        report = export_adapter(
            adapter,
            output,
            base_model,
            merge_shared=merge_shared,
            dtype=dtype,
            device=device,
            write_base_model=not no_base,
            verify=not no_verify,
            probes=_probes(probe, adapter, base_model) if probe else None,
            overwrite=overwrite,
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        _show(report, output, no_base)


def _probes(path: Path, adapter: Path, base_model: str | None) -> list[list[int]]:
    """Token ids of the chains of a file.

    Raises:
        ValueError: If it holds no chain, or a row that is none.
    """
    from axolotl_mote.chain import check_row, encode_chain
    from axolotl_mote.generation.loading import load_tokenizer, read_adapter_config

    config = read_adapter_config(adapter)
    tokenizer = load_tokenizer(adapter, str(base_model or config["base_model_name_or_path"]), config)
    probes: list[list[int]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                faults = check_row(row, config["steps"])
            except json.JSONDecodeError as error:
                faults = [f"the line must be JSON; got {error}. Correct it."]
            if faults:
                raise ValueError(f"--probe must hold chains; {path} row {number}: {' '.join(faults)}")
            probes.append(encode_chain(row, tokenizer, config["steps"])["input_ids"])
    if not probes:
        raise ValueError(f"--probe must hold at least one chain; got none in {path}. Add rows.")
    return probes


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
    console = Console(markup=False)  # folder names are no markup
    console.print(table)
    console.print(f"adapters: {output / 'adapters'}", highlight=False, soft_wrap=True)
    if not no_base:
        console.print(f"base model ({report.dtype}): {output / 'base'}", highlight=False, soft_wrap=True)
    if report.verified:
        console.print(
            f"largest difference from the step-routed model: {report.largest_difference:.1e}", highlight=False
        )
