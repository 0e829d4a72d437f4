"""The paper's comparisons at small scale: train every row, answer in every mode, one JSON line per finished run.

    python tests/ablations/run.py                                       # the main rows, seeds 0 to 2, look-up
    python tests/ablations/run.py --rows mote,lora-4r --seeds 0
    python tests/ablations/run.py --rows all --seeds 0 --steps 2 --per-level 2 --results outputs/two-steps.jsonl
    python tests/ablations/run.py --data safety --seeds 0

First the learning rate of each kind of adapter is tuned, on rows that are neither trained on nor asked later; then the
runs are taken seed by seed. A run whose line is in the results file is skipped; a line counts only while its settings
hash (configuration, data, how it is asked) is that of today. A run that was killed after training goes on with
answering. One thread each, so two may run beside each other with different --rows.

Training is the real `axolotl train` in a process of its own; answers come from `generate_chain`, greedily.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import lookup
import rows as table
import yaml
from rows import MAIN, RATES, ROOT, ROWS, SIZES, STEPS, TUNED, Row, Sizes, digest, small

from axolotl_mote.chain.steps import ADAPTIVE, chain_form
from axolotl_mote.files import (
    AppendLog,
    FileInUseError,
    RowFault,
    installed_versions,
    json_line,
    read_jsonl,
    write_atomically,
)

FORMAT = 1
"""Part of every settings hash; raised when runs with the same settings come out differently."""
WORK = ROOT / "outputs/ablations"
RESULTS = ROOT / "docs/results/ablations.jsonl"
FORMS = (("response",), ("analysis", "response"), STEPS)
MAX_NEW_TOKENS = 96
HELDOUT_LOSS = 80
"""Rows whose loss is measured."""
RECORD = "trained.json"
PER_LEVEL = 100
"""Questions of each level in the adaptive mode."""
JUDGED = 50
"""Prompts of each kind that the refusal judge sees: answers to them are long."""
PACKAGES = ("torch", "transformers", "peft", "axolotl")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a row, a seed, a data set, and the sizes."""

    name: str
    seed: int
    data: str
    sizes: Sizes
    per_level: int
    batch: int
    base_model: str

    @property
    def row(self) -> Row:
        """The row of the table."""
        return ROWS[self.name]

    @cached_property
    def settings(self) -> str:
        """Hash of all that the result depends on."""
        configs: list[Any] = [self.base_model]
        if self.trains:
            configs = [self.config(config, "train", "heldout") for config in self.row.configs]
        judged_by = [_judge().revision] if self.data == "safety" else []
        return digest(
            *judged_by,
            FORMAT,
            self.row.answers,
            configs,
            self.data,
            self.rows(),
            self.per_level,
            self.batch,
            MAX_NEW_TOKENS,
            table.load(self.row.configs[0]),
        )

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.row.kind != "none"

    @property
    def folder(self) -> Path:
        """Where its files are while it runs."""
        return WORK / f"{self.data}-{self.name}-{self.seed}-{self.settings}"

    def config(self, config: str, train: str, heldout: str) -> dict[str, Any]:
        """The configuration of one of its trainings."""
        return small(config, self.sizes, self.row.kind, self.seed, train, heldout, self.base_model)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows to train on and rows whose loss is measured."""
        if self.data == "safety":
            folder = ROOT / "example_configs/data"
            return _read(folder / "seed_chains.jsonl"), _read(folder / "seed_chains_heldout.jsonl")
        if self.data == "tuning":
            return lookup.train_rows(self.sizes.train, 1000 + self.seed), lookup.tuning_rows()[:HELDOUT_LOSS]
        return lookup.train_rows(self.sizes.train, self.seed), lookup.test_rows()[:HELDOUT_LOSS]

    def asked(self, steps: Any) -> list[dict[str, Any]]:
        """Rows that are answered in a mode: half as many in a fixed mode as in the adaptive one, which is compared."""
        count = self.per_level if steps == ADAPTIVE else max(1, self.per_level // 2)
        return [
            row for level in lookup.LEVELS for row in [r for r in lookup.test_rows() if r["level"] == level][:count]
        ]


def _read(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, row in read_jsonl(path):
        if isinstance(row, RowFault):
            raise ValueError(f"{path} must hold JSON objects; got {row} at row {number}. Correct the line.")
        found.append(row)
    return found


# --- results ----------------------------------------------------------------------------------------------------------


def finished(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of a results file by row and settings hash; a torn last line is none."""
    if not results.exists():
        return {}
    lines = [row for _, row in read_jsonl(results) if not isinstance(row, RowFault)]
    return {(line["row"], line["settings"]): line for line in lines if "row" in line and "settings" in line}


def append(results: Path, line: dict[str, Any], patience: float = 60.0) -> None:
    """Append a line, waiting while another run appends its own.

    Raises:
        FileInUseError: If the file stays locked.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with AppendLog(results, begins=b'{"row"') as log:
                log.append([line])
            return
        except FileInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


# --- training ---------------------------------------------------------------------------------------------------------


def train(job: Job) -> list[dict[str, Any]]:
    """Train every configuration of a job, unless that is done, and return what each logged."""
    logs = []
    files = []
    for name, rows in zip(("train", "heldout"), job.rows(), strict=True):
        path = job.folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, b"".join(map(json_line, rows)).decode())
        files.append(str(path.relative_to(ROOT)))
    for number, config in enumerate(job.row.configs):
        output = job.folder / f"adapter-{number}"
        if not output.exists():
            # A folder of this process: if a run is killed, its training goes on for a while and writes to its own.
            staging = job.folder / f"{output.name}-{os.getpid()}"
            shutil.rmtree(staging, ignore_errors=True)
            values = job.config(config, *files)
            values["output_dir"] = str(staging.relative_to(ROOT))
            values["dataset_prepared_path"] = str((job.folder / f"prepared-{os.getpid()}").relative_to(ROOT))
            seconds = _axolotl_train(values, staging.with_suffix(".yml"))
            write_atomically(staging / RECORD, json.dumps({"seconds": seconds, **_history(staging)}))
            staging.rename(output)
        logs.append(json.loads((output / RECORD).read_text(encoding="utf-8")))
    return logs


def _axolotl_train(values: dict[str, Any], path: Path) -> float:
    """Run `axolotl train` on one thread; returns its CPU seconds."""
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))
    before = os.times()
    _command("axolotl", ["train", str(path.relative_to(ROOT)), "--launcher", "python"], path.with_suffix(".log"))
    after = os.times()
    return round(after.children_user + after.children_system - before.children_user - before.children_system, 1)


def _command(name: str, arguments: list[str], log: Path) -> None:
    """Run a command of this Python's environment.

    Raises:
        RuntimeError: If it fails, with the end of its log.
    """
    command = [str(Path(sys.executable).parent / name), *arguments]
    with log.open("wb") as out:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command)} failed with exit status {done.returncode}. {log} ends with:\n{end}")


def environment() -> dict[str, str]:
    """Environment of a training process: one thread, no network, the baselines' plugins on the path."""
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path, "PATH": scripts}


def _history(output: Path) -> dict[str, Any]:
    """What training logged: held-out losses before and after, the trained losses, the tokens of each step's rows."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    trained = [entry for entry in log if "loss" in entry]
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return {
        "steps": max(entry["step"] for entry in log),
        "heldout": [_losses(entry, "eval_") for entry in (evaluations[0], evaluations[-1])],
        "loss": [[entry["step"], round(entry["loss"], 4)] for entry in trained],
        "order": digest([[entry.get(f"tokens/{step}") for step in STEPS] for entry in trained]),
    }


def _losses(entry: dict[str, Any], prefix: str) -> dict[str, float]:
    named = {key.removeprefix(f"{prefix}loss/"): v for key, v in entry.items() if key.startswith(f"{prefix}loss/")}
    return {name: round(value, 4) for name, value in {**named, "all": entry[f"{prefix}loss"]}.items()}


# --- answering --------------------------------------------------------------------------------------------------------


class System:
    """A trained row, ready to answer."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        self.job = job
        options: dict[str, Any] = {"dtype": torch.bfloat16, "self_check": False}
        folders = [job.folder / f"adapter-{number}" for number in range(len(job.row.configs))]
        if job.row.answers == "fixed":
            from separate import load_separate

            self.model, self.codec = load_separate(dict(zip(STEPS, folders, strict=True)), **options)
        elif job.row.kind == "mixture":
            from mixture import load_mixture

            self.model, self.tokenizer = load_mixture(folders[0], **options)
        else:
            from axolotl_mote.generation.loading import load_mote

            self.model, self.tokenizer = load_mote(folders[0], **options)
        # As MoTE's head does: a strided view would cost a copy of the weights for each row of a batch.
        self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))

    @property
    def modes(self) -> dict[str, Any]:
        """Modes that the row can be asked in."""
        if self.job.row.answers == "response":
            return {"response": ["response"]}
        fixed: dict[str, Any] = {chain_form(form): list(form) for form in FORMS}
        return fixed if self.job.row.answers == "fixed" else {ADAPTIVE: ADAPTIVE, **fixed}

    def answer(self, dialogues: list[Any], steps: Any) -> list[Any]:
        """Chains in the order of the dialogues."""
        if self.job.row.answers == "fixed":
            from separate import generate_separate

            return generate_separate(self.model, self.codec, dialogues, steps, MAX_NEW_TOKENS, self.job.batch)
        from axolotl_mote.generation.api import generate_chain

        return list(
            generate_chain(self.model, self.tokenizer, dialogues, steps, MAX_NEW_TOKENS, batch_size=self.job.batch)
        )


def answers(job: Job) -> dict[str, dict[str, Any]]:
    """Cells by mode and level; on the safety chains counts by mode, kind of prompt and verdict; none when tuning."""
    if job.row.answers == "none" or job.data == "tuning":
        return {}
    if job.row.answers == "base":
        return prompted(job)
    system, found = System(job), {}
    if job.data == "safety":
        return {mode: judged(job, system, steps) for mode, steps in system.modes.items()}
    for mode, steps in system.modes.items():
        asked = job.asked(steps)
        cells = lookup.score(asked, system.answer([row["messages"] for row in asked], steps))
        found[mode] = {
            level: {"right": c.right, "n": c.n, "tokens": round(c.tokens, 2), "finished": c.finished}
            for level, c in cells.items()
        }
        say(f"  {mode:28}" + "  ".join(f"{level} {c.accuracy:.2f} ({c.tokens:.0f})" for level, c in cells.items()))
    return found


@cache
def _judge() -> Any:
    from axolotl_mote.evaluation.judges.refusal import RefusalJudge

    return RefusalJudge.load()


def judged(job: Job, system: System, steps: Any) -> dict[str, dict[str, int]]:
    """Verdicts of the local judge on answers to XSTest's prompts, counted by kind of prompt."""
    from axolotl_mote.benchmarks.loading import load_prompts

    judge, found = _judge(), {}
    for subset in ("safe", "unsafe"):
        prompts = load_prompts("xstest", subset=subset, limit=min(job.per_level, JUDGED))
        chains = system.answer([list(prompt.messages) for prompt in prompts], steps)
        verdicts = Counter[str]()
        for prompt, chain in zip(prompts, chains, strict=True):
            answer = chain.answer.strip()
            verdicts[judge.judge(prompt.messages[-1]["content"], answer)[0] if answer else "empty"] += 1
        verdicts["cut off"] = sum(not chain.finished for chain in chains)
        found[subset] = dict(verdicts)
    say(f"  {steps}: {found}")
    return found


def prompted(job: Job) -> dict[str, dict[str, Any]]:
    """The base model asked for each chain form by the builder's prompts: chains, and mean characters of an answer."""
    found = {}
    for form in ("response", "analysis", "guidance", "full"):
        output = job.folder / form
        values = table.load(job.row.configs[0]) | {"output": str(output), "chain": form}
        values["models"]["default"] |= {"path": job.base_model, "device": "cpu"}
        values["questions"][0]["limit"] = min(job.per_level, 24)
        limit = {"max_new_tokens": MAX_NEW_TOKENS}
        values["stages"] = dict.fromkeys(STEPS, limit)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(job.folder / f"{form}.yml", yaml.safe_dump(values, sort_keys=False))
        _command("axolotl-mote", ["build", str(job.folder / f"{form}.yml")], job.folder / f"{form}.log")
        rows = _read(output / "chains.jsonl")
        characters = sum(len(row["response"]) for row in rows)
        found[form] = {"chains": len(rows), "characters": round(characters / max(1, len(rows)), 1)}
    return found


# --- one run ----------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    """Train and answer; returns the line of the results file."""
    logs = train(job) if job.trains else []
    start = time.process_time()
    found = answers(job)
    return {
        "row": job.name,
        "seed": job.seed,
        "data": job.data,
        "settings": job.settings,
        "configs": list(job.row.configs),
        "rank": job.sizes.rank,
        "learning_rate": job.sizes.learning_rates.get(job.row.kind),
        "steps": job.sizes.steps,
        "batch": job.sizes.batch,
        "trainings": logs,
        "answers": found,
        "judge": _judge().revision if job.data == "safety" else None,
        "answer_seconds": round(time.process_time() - start, 1),
        "machine": {"cpu": _cpu(), "threads": 1, "versions": dict(installed_versions(PACKAGES))},
    }


def _cpu() -> str:
    names = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def say(text: str) -> None:
    """Print at once: the output is read while runs go on."""
    print(text, flush=True)


def sizes_of(options: argparse.Namespace, rates: dict[str, float] | None = None) -> Sizes:
    """The sizes of the data set, changed by the options and with learning rates by kind."""
    sizes = SIZES[options.data]
    changes: dict[str, Any] = {"learning_rates": sizes.learning_rates | (rates or {})}
    if options.steps:
        changes |= {"steps": options.steps, "train": min(sizes.train, max(4, options.steps * sizes.batch))}
    return dataclasses.replace(sizes, **changes)


def jobs(options: argparse.Namespace, rates: dict[str, float] | None = None) -> Iterator[Job]:
    """The jobs in order: seed by seed, within a seed row by row."""
    sizes = sizes_of(options, rates)
    for seed in options.seeds:
        for name in options.rows:
            yield Job(name, seed, options.data, sizes, options.per_level, options.batch, options.model)


def tuning_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The jobs that compare learning rates; none for a trial of a few steps, and none for the safety chains.

    The lowest rate is left out where the highest turned out better than the first.
    """
    if options.steps or options.data != "lookup":
        return
    kinds = {ROWS[name].kind for name in options.rows} & TUNED.keys()
    for rate in RATES:
        for kind in TUNED:
            if kind in kinds and not (rate == min(RATES) and tuned_rate(options, kind) == max(RATES)):
                yield tuning_job(options, kind, rate)


def tuning_job(options: argparse.Namespace, kind: str, rate: float) -> Job:
    """Training with one learning rate; nothing is answered."""
    return Job(TUNED[kind], 0, "tuning", sizes_of(options, {kind: rate}), 0, 0, options.model)


def tuned_rate(options: argparse.Namespace, kind: str) -> float | None:
    """The rate of least held-out loss of a kind, of all that are in the results file."""
    lines = finished(options.results)
    losses = {}
    for rate in RATES:
        job = tuning_job(options, kind, rate)
        if (line := lines.get((job.name, job.settings))) is not None:
            losses[rate] = line["trainings"][0]["heldout"][-1]["all"]
    return min(losses, key=losses.__getitem__) if losses else None


def tuned_rates(options: argparse.Namespace) -> dict[str, float]:
    """``tuned_rate`` of every kind that has one."""
    if options.steps or options.data != "lookup":
        return {}
    found = {kind: tuned_rate(options, kind) for kind in TUNED}
    return {kind: rate for kind, rate in found.items() if rate is not None}


def _names(text: str) -> list[str]:
    chosen = {"main": list(MAIN), "all": list(ROWS)}.get(text) or text.split(",")
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"rows must be among {', '.join(ROWS)}; got {', '.join(unknown)}. Correct the name."
        )
    return chosen


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=_names, default=list(MAIN), help="names, separated by commas; main; all")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--data", choices=["lookup", "safety"], default="lookup")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the full run, to try a row")
    parser.add_argument("--per-level", type=int, default=PER_LEVEL, help="questions of a level, half in fixed modes")
    parser.add_argument("--batch", type=int, default=PER_LEVEL // 2, help="questions answered together")
    parser.add_argument("--model", default=table.MODEL, help="base model")
    parser.add_argument("--keep", action="store_true", help="keep adapters and logs below outputs/ablations")
    options = parser.parse_args(argv)
    if not 1 <= options.per_level <= lookup.PER_LEVEL:
        parser.error(f"--per-level must be from 1 to {lookup.PER_LEVEL}; got {options.per_level}. Choose another.")
    return options


def run_all(options: argparse.Namespace, todo: Iterable[Job]) -> int:
    """Run the jobs that are not finished; returns the number of failed runs."""
    failed = 0
    for job in todo:
        label = f"{job.data} {job.name} seed {job.seed} lr {job.sizes.learning_rates.get(job.row.kind)}"
        if (job.name, job.settings) in finished(options.results):
            say(f"{label}: finished before")
            continue
        say(f"{label}: {job.settings}")
        try:
            line = run(job)
        except (RuntimeError, ValueError, OSError) as error:  # one row that fails must not cost a night's other rows
            say(f"{label}: FAILED\n{error}")
            failed += 1
            continue
        append(options.results, line)
        losses = [log["heldout"][-1] for log in line["trainings"]]
        seconds = [log["seconds"] for log in line["trainings"]]
        say(f"{label}: heldout {losses}, {seconds} + {line['answer_seconds']} s")
        if not options.keep:
            shutil.rmtree(job.folder, ignore_errors=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, then run what is not finished; returns the number of failed runs."""
    options = parse(argv)
    options.results = options.results.resolve()
    os.chdir(ROOT)
    failed = run_all(options, tuning_jobs(options))
    rates = tuned_rates(options)
    say(f"learning rates: {rates or sizes_of(options).learning_rates}")
    return failed or run_all(options, jobs(options, rates))


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
