"""Everything that a GPU must show, in one command and under ten minutes; what fails costs no other part.

    python tests/bench/gpu_session.py                                # one GPU; writes outputs/gpu/results.json
    python tests/bench/gpu_session.py --device cpu --rounds 1        # the same program with tiny shapes, for its test

Each part is a process of its own with a time limit: tests of tests/model/test_gpu.py, or variants of train_step.py.
results.json is replaced in one rename after every part, so that it is complete and readable whenever the machine goes
away. Needs torch, transformers, peft and pytest beside the package's few own dependencies, and no axolotl; this file
itself needs nothing, so that it can name what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft", "pytest", "flash_attn", "liger_kernel", "axolotl")
TAIL = 4000  # characters of output that are kept
LAST_SECONDS = 20  # a part is not started with less time left

DESCRIBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"cuda": cuda, "device": torch.cuda.get_device_name() if cuda else None,
                  "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
                  "cuda_version": torch.version.cuda}))
"""


@dataclass(frozen=True)
class Part:
    """A name, a command, the seconds it may take and the packages without which it is not run."""

    name: str
    command: tuple[str, ...]
    limit: int
    needs: tuple[str, ...] = ("torch", "transformers", "peft")

    @property
    def kind(self) -> str:
        """How its output is read."""
        return "tests" if "pytest" in self.command else "bench"


@dataclass
class Outcome:
    """What became of a part; the status is `ok`, `failed` or `not run: NAME`."""

    name: str
    status: str = "not run: not reached"
    seconds: float = 0.0
    summary: str = ""
    tail: str = ""
    bench: dict[str, Any] | None = field(default=None)


def tests(name: str, expression: str, limit: int, *further: str) -> Part:
    """A part that runs the GPU tests that an expression selects."""
    command = (
        *("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        *("tests/model/test_gpu.py", "-k", expression),
    )
    return Part(name, command, limit, ("torch", "transformers", "peft", "pytest", *further))


def bench(name: str, variants: str, limit: int, options: argparse.Namespace, *further: str) -> Part:
    """A part that times variants of a training step."""
    shapes = ("--size", "tiny", "--layout", "packed", "--checkpointing", "--compile-backend", "aot_eager")
    command = (
        *("tests/bench/train_step.py", "--json", "--device", options.device, "--rounds", str(options.rounds)),
        *("--variants", variants, *(shapes if options.device == "cpu" else ())),
    )
    return Part(name, command, limit, ("torch", "transformers", "peft", "rich", *further))


def all_parts(options: argparse.Namespace) -> list[Part]:
    """What is run, the most telling first; the limits bound a part that hangs, and add up to more than the session."""
    return [
        tests("attention", "not compiled and not graphs and not flash", 100),
        tests("compiled", "(compiled or graphs) and not flash", 150),
        tests("flash attention", "flash", 60, "flash_attn"),
        bench("step", "peft_lora_r64,peft_lora_r64_scored,mote,mote_dropout_flex,peft_lora_r64_compiled,"
              "mote_compiled,mote_dropout_flex_compiled", 260, options),
        bench("fused kernels", "peft_lora_r64_compiled,axolotl_kernels_r64_liger,mote_dropout_flex_compiled", 200,
              options, "axolotl", "liger_kernel"),
        bench("other ways", "peft_lora_r64,mote,mote_dropout_dense,mote_dropout_varlen,masked_loras", 150, options),
    ]  # fmt: skip


# --- running --------------------------------------------------------------------------------------------------------


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def environment(device: str) -> dict[str, str]:
    """This process's environment, with the package importable from here whether or not it is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "MOTE_GPU_TESTS": device, "PYTHONUNBUFFERED": "1"}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **own}


def run_part(part: Part, device: str, limit: float) -> Outcome:
    """Run one part; whatever it does, an outcome comes back within the limit."""
    outcome = Outcome(part.name)
    if absent := missing(part.needs):
        outcome.status = f"not run: {', '.join(absent)}"
        return outcome
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, env=environment(device), stdin=subprocess.DEVNULL,
            stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            outcome.summary = f"stopped after {limit:.0f} s"
        finally:  # compilers' workers too, and when this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0), err.seek(0)
        stdout, stderr = out.read(), err.read()
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.status = "ok" if code == 0 else "failed"
    read = read_tests if part.kind == "tests" else read_bench
    read(outcome, stdout)
    # JSON stands in `bench`; the table of the benchmark and all messages are on standard error.
    outcome.tail = ((stdout if part.kind == "tests" or outcome.bench is None else "") + stderr)[-TAIL:]
    return outcome


def read_tests(outcome: Outcome, stdout: str) -> None:
    """Counts of a pytest run; one in which nothing ran is not ok."""
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", stdout.rpartition("\n====")[2][-400:])
    outcome.summary = outcome.summary or ", ".join(" ".join(pair) for pair in counts)
    if outcome.status == "ok" and not any(kind == "passed" for _, kind in counts):
        outcome.status = "not run: every test was skipped"


def read_bench(outcome: Outcome, stdout: str) -> None:
    """The benchmark's JSON, if it came so far."""
    with contextlib.suppress(ValueError):
        outcome.bench = json.loads(stdout)
    if outcome.bench is None:
        outcome.status = "failed"
        return
    failed = [name for name, reason in outcome.bench["skipped"].items() if reason.startswith("failed")]
    count = len(outcome.bench["rows"])
    outcome.summary = f"{count} variants timed" + (f", failed: {', '.join(failed)}" if failed else "")


# --- results --------------------------------------------------------------------------------------------------------


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(results, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def describe(device: str) -> dict[str, Any]:
    """Versions and the device; asked in a process of its own, since a broken driver can hang or kill."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name.replace("_", "-"))
    found: dict[str, Any] = {"cuda": False, "device": None}
    with contextlib.suppress(subprocess.SubprocessError, ValueError):
        done = subprocess.run(
            [sys.executable, "-c", DESCRIBE], capture_output=True, text=True, timeout=120, env=environment(device)
        )
        found = json.loads(done.stdout)
    return {"versions": versions, "gpu": found, "machine": platform.platform()}


def print_table(outcomes: list[Outcome]) -> None:
    """A line per part, then the times of every benchmark."""
    for one in outcomes:
        print(f"{one.name:16} {one.status:32} {one.seconds:7.1f} s  {one.summary}")
    for one in outcomes:
        if one.bench is None:
            continue
        ratios = one.bench["ratios"]
        print(f"\n{one.name}: {one.bench['machine']}; matmul floor {one.bench['matmul_floor_ms']:.1f} ms")
        print(f"{'variant':30}{'median ms':>11}{'GiB':>8}" + "".join(f"{'x ' + name:>30}" for name in ratios))
        for row in one.bench["rows"]:
            memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
            cells = "".join(f"{ratios[name][row['variant']]:30.3f}" for name in ratios)
            print(f"{row['variant']:30}{row['median_ms']:11.1f}{memory:>8}{cells}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run with tiny shapes")
    parser.add_argument("--rounds", type=int, default=7, help="of every benchmark; default: 7")
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together; default: 570")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/gpu/results.json")
    return parser.parse_args(arguments)


def session(parts: list[Part], options: argparse.Namespace) -> int:
    """Run parts and keep results.json up to date; 1 if one failed or there is no GPU."""
    end = time.monotonic() + options.seconds
    outcomes = [Outcome(part.name) for part in parts]
    about = describe(options.device)
    usable = options.device == "cpu" or about["gpu"]["cuda"]
    if not usable:
        for outcome in outcomes:
            outcome.status = "not run: " + (", ".join(missing(["torch"])) or "CUDA")

    def save() -> None:
        write(options.output, {**about, "device": options.device, "parts": [asdict(one) for one in outcomes]})

    save()
    if not usable:
        print(f"A CUDA device must be there; torch finds none ({about['gpu']}). Use --device cpu for a dry run.")
    for number, part in enumerate(parts if usable else []):
        left = end - time.monotonic()
        if left < LAST_SECONDS:
            outcomes[number].status = "not run: time"
        else:
            print(f"{part.name} ...", flush=True)
            outcomes[number] = run_part(part, options.device, min(part.limit, left))
            print(f"{part.name}: {outcomes[number].status}, {outcomes[number].summary}", flush=True)
        save()
    print()
    print_table(outcomes)
    print(f"\n{options.output}")
    return int(not usable or any(one.status == "failed" for one in outcomes))


def main(arguments: list[str] | None = None) -> int:
    """Run the session."""
    options = parse(arguments)
    return session(all_parts(options), options)


if __name__ == "__main__":
    sys.exit(main())
