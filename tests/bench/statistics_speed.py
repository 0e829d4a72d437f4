"""Statistics of 6,000 chains of 200 words each: seconds and peak memory of ``axolotl mote stats``'s work.

python tests/bench/statistics_speed.py [CHAINS] [WORDS]
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from axolotl_mote.builder.output.report import write_html
from axolotl_mote.builder.output.statistics import read_chains, summarize


def write_chains(path: Path, chains: int, words: int) -> None:
    """Chains whose words follow Zipf's law over 30,000 words; 71 % hold an analysis, 61 % a guidance."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(30_000)]
    weights = [1 / (i + 1) for i in range(len(vocabulary))]
    with path.open("w") as file:
        for number in range(chains):
            text = rng.choices(vocabulary, weights, k=words)
            third = words // 3
            row = {
                "messages": [{"role": "user", "content": f"question {number}"}],
                "analysis": " ".join(text[:third]) if rng.random() < 0.715 else None,
                "guidance": " ".join(text[third : 2 * third]) if rng.random() < 0.614 else None,
                "response": " ".join(text[2 * third :]),
                "check": "safe",
            }
            # Every chain holds the full number of words, whatever its form.
            missing = "".join(
                f" {w}" for w in text[: (row["analysis"] is None) * third + (row["guidance"] is None) * third]
            )
            row["response"] = f"{row['response']}{missing}"
            file.write(json.dumps(row) + "\n")


def main(chains: int, words: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chains.jsonl"
        write_chains(path, chains, words)
        started = time.monotonic()
        summary = summarize(read_chains(path))
        write_html(Path(folder) / "s.html", summary, "chains")
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    values = {step: numbers.self_bleu for step, numbers in summary.steps.items()}
    print(f"{chains} chains of {words} words: {seconds:.1f} s, peak memory {peak:.2f} GiB, Self-BLEU {values}")


if __name__ == "__main__":
    main(*(int(value) for value in (*sys.argv[1:], *("6000", "200")[len(sys.argv) - 1 :])))
