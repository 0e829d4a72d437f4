"""``axolotl mote stats``: amounts, lengths and diversity of a chain data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from axolotl_mote.chain.steps import CHECK, DEFAULT_STEPS, chain_form, parse_form, validate_steps
from axolotl_mote.cli._options import json_option, usage_errors
from axolotl_mote.cli.json_output import json_writer
from axolotl_mote.files import read_all_rows


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--rejected",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with rejected rows; by default rejected.jsonl beside FILE, if there is one.",
)
@click.option(
    "--steps",
    multiple=True,
    default=(chain_form(DEFAULT_STEPS),),
    show_default=True,
    help="The steps of the chains, such as plan+draft+answer; may be repeated.",
)
@json_option("Print JSON instead of tables.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write one self-contained HTML page with plots.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=10_000,
    show_default=True,
    help="Chains drawn for Self-BLEU; 0 uses all.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draw.")
def command(
    file: Path,
    rejected: Path | None,
    steps: tuple[str, ...],
    as_json: bool,
    html: Path | None,
    sample: int,
    seed: int,
) -> None:
    """Show amounts, lengths and diversity of a chain data set (MoTE, Table 2).

    FILE is the output of `axolotl mote build` or `axolotl mote generate`. Questions that generation refused are counted
    separately.

    \b
    Examples:
      axolotl mote stats outputs/selfalign/data/chains.jsonl --html statistics.html
      axolotl mote stats answers.jsonl --steps plan+draft+answer
    """
    write_json = json_writer() if as_json else None
    beside = file.with_name("rejected.jsonl")
    if rejected is None and beside.exists() and beside != file:
        rejected = beside
    with usage_errors(extra="stats"):
        if html is not None and html.exists() and any(html.samefile(read) for read in (file, rejected) if read):
            raise ValueError(f"--html must not name a file that is read; got {html}. Choose another name.")
        from axolotl_mote.builder.output.report import write_html
        from axolotl_mote.builder.output.statistics import read_chains, summarize
        from axolotl_mote.builder.output.tables import print_summary

        names = _step_names(steps)
        rejects = read_all_rows(rejected) if rejected else ()
        summary = summarize(read_chains(file, names), rejects, steps=names, sample=sample, seed=seed)
        if html is not None:
            write_html(html, summary, title=file.name)
    if write_json is not None:
        write_json(summary.as_dict())
        return
    from rich.console import Console

    print_summary(summary, Console(markup=False))
    if html is not None:
        click.echo(f"Wrote {html}")


def _step_names(values: Sequence[str]) -> tuple[str, ...]:
    """``("plan+draft", "answer")`` -> the three names. ``check`` is left out: it is a verdict, not a text.

    Raises:
        ValueError: If they are not valid steps.
    """
    try:
        steps = validate_steps([name for value in values for name in parse_form(value)])
    except ValueError as error:
        raise ValueError(str(error).replace("mote.steps", "--steps")) from None
    return tuple(step for step in steps if step != CHECK)
