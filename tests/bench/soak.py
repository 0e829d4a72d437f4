"""A soak: 2,000 optimizer steps and 10,000 answers on a tiny model, and whether memory stays flat.

    python tests/bench/soak.py outputs/soak

Each part runs in a process of its own, whose resident memory is read from outside every half second. The slope is of
a straight line through the second half: what grows there would grow for ever.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import psutil

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "doctor")]


def write_model(folder: Path) -> Path:
    from kit import tiny_model, tiny_tokenizer

    model = tiny_model(hidden=64)
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    model.save_pretrained(folder)
    tiny_tokenizer(()).save_pretrained(folder)
    return folder


def training(folder: Path, count: int) -> list[str]:
    """`axolotl train` with a checkpoint and an evaluation every tenth of the way."""
    from doctor_kit import write_tiny_config

    tenth = max(count // 10, 1)
    path = write_tiny_config(
        folder,
        write_model(folder / "model"),
        max_steps=count,
        num_epochs=None,
        learning_rate=1e-4,
        save_strategy="steps",
        save_steps=tenth,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=tenth,
        test_datasets=[{"path": str(folder / "chains.jsonl"), "type": "axolotl_mote.chain"}],
    )
    return [str(Path(sys.executable).parent / "axolotl"), "train", str(path), "--launcher", "python"]


def generation(folder: Path, count: int) -> list[str]:
    return [sys.executable, __file__, str(folder), "--answers", str(count), "--generate"]


def generate(count: int) -> None:
    """Answer questions of many lengths in every mode, eight at a time."""
    from kit import tiny_mote

    from axolotl_mote import generate_chain

    model, tokenizer = tiny_mote()
    modes: list[str | list[str]] = ["adaptive", ["response"], ["analysis", "guidance", "response"], "verify"]
    for start in range(0, count, 8):
        questions = [[{"role": "user", "content": f"{'word ' * ((start + i) % 23)}{start + i}?"}] for i in range(8)]
        generate_chain(model, tokenizer, questions, modes[start // 8 % 4], 24, do_sample=True, seed=start)


def watch(command: list[str], log: Path) -> np.ndarray:
    """Run a command and return its memory, (N, 2): seconds since the start, MiB."""
    readings, begin = [], time.monotonic()
    with log.open("wb") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=TESTS.parent)
        while process.poll() is None:
            with process.oneshot():
                if process.status() != psutil.STATUS_ZOMBIE:
                    readings.append((time.monotonic() - begin, process.memory_info().rss / 2**20))
            time.sleep(0.5)
    if process.returncode:
        raise click.ClickException(f"{command[1]} ended with status {process.returncode}; see {log}")
    return np.array(readings)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=2000, show_default=True)
@click.option("--answers", default=10_000, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Where the picture goes; default: FOLDER/soak.svg.")
@click.option("--generate", "child", is_flag=True, hidden=True)
def main(folder: Path, steps: int, answers: int, plot: Path | None, child: bool) -> None:
    """Print a table and draw the memory of both parts."""
    if child:
        generate(answers)
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    click.echo(
        "| part | seconds | MiB at a half | MiB at the end | MiB per 1,000 in the second half |\n|---|---|---|---|---|"
    )
    parts = [(f"{steps:,} steps", training, steps), (f"{answers:,} answers", generation, answers)]
    for axis, (name, command, count) in zip(axes, parts, strict=True):
        readings = watch(command(folder, count), folder / f"{command.__name__}.log")
        half = readings[len(readings) // 2 :]
        done = half[:, 0] / readings[-1, 0] * count  # about, since the start takes time too
        slope = 1000 * np.polyfit(done, half[:, 1], 1)[0]
        click.echo(f"| {name} | {readings[-1, 0]:.0f} | {half[0, 1]:.0f} | {half[-1, 1]:.0f} | {slope:+.2f} |")
        axis.plot(readings[:, 0], readings[:, 1])
        axis.set(title=name, xlabel="seconds", ylabel="resident memory, MiB", ylim=(0, None))
    figure.savefig(plot or folder / "soak.svg")


if __name__ == "__main__":
    main()
