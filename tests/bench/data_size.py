"""Checking, encoding and describing many chains: rows a second, and peak memory beyond that of the imports.

    python tests/bench/data_size.py models/SmolLM2-135M-Instruct [--rows 100000]

The rows are the seed chains over and over, each with a question of its own. Every part runs in a process of its own and
is timed in CPU seconds, on one thread. Encoding is what `axolotl preprocess` and `axolotl train` run, without workers.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

TESTS = Path(__file__).resolve().parent.parent
SEEDS = TESTS.parent / "example_configs/data/seed_chains.jsonl"
STEPS = ["analysis", "guidance", "response"]


def write_rows(path: Path, count: int) -> None:
    seeds = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number, row in zip(range(count), itertools.cycle(seeds), strict=False):
            *before, last = row["messages"]
            asked = {**last, "content": f"{last['content']} ({number})"}
            file.write(json.dumps({**row, "id": str(number), "messages": [*before, asked]}) + "\n")


def checking(path: Path, model: str) -> Callable[[], object]:
    from axolotl_mote.training.dataset import Columns, check_file

    return lambda: check_file(path, STEPS, Columns())


def encoding(path: Path, model: str) -> Callable[[], object]:
    sys.path.insert(0, str(TESTS))
    from datasets import disable_progress_bars, load_dataset
    from kit import with_markers
    from transformers import AutoTokenizer

    from axolotl_mote.chain.codec import ChainCodec
    from axolotl_mote.training.dataset import encode_dataset

    disable_progress_bars()
    codec = ChainCodec(with_markers(AutoTokenizer.from_pretrained(model)), STEPS)
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    return lambda: encode_dataset(data, codec, 2048)


def statistics(path: Path, model: str) -> Callable[[], object]:
    from axolotl_mote.builder.output.statistics import read_chains, summarize

    return lambda: summarize(read_chains(path))


PARTS = {"check": checking, "encode": encoding, "stats": statistics}


@click.command()
@click.argument("model")
@click.option("--rows", default=100_000, show_default=True)
@click.option("--part", type=click.Choice(list(PARTS)), hidden=True)
@click.option("--path", type=click.Path(path_type=Path), hidden=True)
def main(model: str, rows: int, part: str | None, path: Path | None) -> None:
    """Print a table of all parts."""
    if part and path:
        run = PARTS[part](path, model)
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        run()
        seconds = time.process_time() - begin
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        click.echo(f"| {part} | {seconds:.1f} | {rows / seconds:,.0f} | {peak:.0f} |")
        return
    click.echo("| part | CPU seconds | rows/s | MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chains.jsonl"
        write_rows(data, rows)
        for name in PARTS:
            command = [sys.executable, __file__, model, "--rows", str(rows), "--part", name, "--path", str(data)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            click.echo(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
