"""The near-duplicate search by itself: CPU seconds and peak memory as texts grow in number.

    python tests/bench/near_duplicates.py [--kind "few words"] [--texts 1000000]

Two kinds of texts: 30 words out of 50,000, as frequent as in a language (the k-th one 1/k times as often as the first),
and 30 words out of 300 behind an instruction of 60 words, in which no part is rare. To make the texts is not timed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import click
import numpy as np

from axolotl_mote.builder.texts.similarity import SimilarTexts

LETTERS = list("etaoinshrdlucmfwypvbgk")


def vocabulary(draw: np.random.Generator, count: int) -> list[str]:
    """Made-up words of about six letters."""
    lengths = np.maximum(1, draw.normal(6, 2, count)).astype(int)
    return ["".join(draw.choice(LETTERS, length)) for length in lengths]


def language() -> Callable[[], str]:
    draw = np.random.default_rng(0)
    words = vocabulary(draw, 50_000)
    shares = np.cumsum(1 / np.arange(1, len(words) + 1))
    return lambda: " ".join(words[i] for i in np.searchsorted(shares, draw.random(30) * shares[-1]))


def few_words() -> Callable[[], str]:
    draw = np.random.default_rng(0)
    words = vocabulary(draw, 300)
    shared = " ".join(draw.choice(words, 60))
    return lambda: shared + " " + " ".join(draw.choice(words, 30))


KINDS = {"language": language, "few words": few_words}


@click.command()
@click.option("--kind", type=click.Choice(list(KINDS)), default="language", show_default=True)
@click.option("--texts", default=100_000, show_default=True)
def main(kind: str, texts: int) -> None:
    """Print a table with a line for every tenth of the texts."""
    click.echo(f"| {kind} | found | CPU seconds | of this tenth | peak MiB |\n|---|---|---|---|---|")
    make, similar, found, total = KINDS[kind](), SimilarTexts(0.8), 0, 0.0
    for tenth in range(1, 11):
        batch = [make() for _ in range(texts // 10)]
        begin = time.process_time()
        for number, text in enumerate(batch):
            if similar.find(text):
                found += 1
            else:
                similar.add(f"{tenth}/{number}", text)
        seconds = time.process_time() - begin
        total += seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        click.echo(f"| {tenth * texts // 10:,} | {found} | {total:.0f} | {seconds:.1f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
