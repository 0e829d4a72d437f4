"""Runs of the real command line on a tiny model, shared by the end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from .commands import BIN, Command, Forks, Result, Run, free_port, leave_nothing_running, start_server


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): runs of the `runs` fixture that a test looks at")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


class Workshop:
    """Writes configurations and runs axolotl in a folder."""

    def __init__(self, folder: Path, model: Path, chains: Path, repo: Path, tied_model: Path | None = None) -> None:
        self.folder, self.model, self.chains, self.repo, self.tied_model = folder, model, chains, repo, tied_model

    def config(self, name: str, **changes: Any) -> Path:
        """Write a configuration; a value of None removes the key."""
        config: dict[str, Any] = {
            "base_model": str(self.model),
            "plugins": ["axolotl_mote.MotePlugin"],
            "adapter": "mote",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            "mote": {"question_routing": "random", "step_dropout": 0.5},
            "datasets": [{"path": str(self.chains), "type": "axolotl_mote.chain"}],
            "dataset_prepared_path": str(self.folder / name / "prepared"),
            "dataset_num_proc": 0,  # in this process: workers would import everything again
            "dataloader_num_workers": 0,
            "sequence_len": 384,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 6,
            # Adam divides by the root of v: with the usual eps of 1e-8 an element whose gradient is rounding noise
            # moves as far as any other, in a random direction, and no two summation orders agree. With eps above the
            # gradients the update is proportional to them, and the optimizer's state still matters on resuming.
            "optimizer": "adamw_torch",
            "adam_epsilon": 0.01,
            "lr_scheduler": "constant",
            "learning_rate": 0.1,
            "weight_decay": 0.0,
            "seed": 42,
            # An evaluation between training steps must leave no trace in them.
            "test_datasets": [{"path": str(self.chains), "type": "axolotl_mote.chain"}],
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "attn_implementation": "sdpa",
            "gradient_checkpointing": False,
            "output_dir": str(self.output(name)),
        }
        config = {key: value for key, value in {**config, **changes}.items() if value is not None}
        path = self.folder / name / "config.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def output(self, name: str) -> Path:
        return self.folder / name / "out"

    def start(self, verb: str, name: str, *extra: str, processes: int = 1, text: str = "", **changes: Any) -> Run:
        """Start an axolotl command, or the workers that torchrun would start, as forks."""
        config, log = self.config(name, **changes), self.folder / name / f"{verb}.log"
        if processes > 1:
            return Forks(["axolotl.cli.train", config], log, self.repo, workers=processes)
        launcher = ["--launcher", "python"] if verb in ("train", "evaluate", "inference") else []
        return Forks(["axolotl", verb, config, *launcher, *extra], log, self.repo, text=text)

    def run(self, verb: str, name: str, *extra: str, processes: int = 1, text: str = "", **changes: Any) -> Result:
        return self.start(verb, name, *extra, processes=processes, text=text, **changes).wait()

    def train(self, name: str, processes: int = 1, **changes: Any) -> Path:
        """Train and return the adapter's folder; several processes share a batch of two."""
        if processes > 1:
            changes = {"micro_batch_size": 1, **changes}
        self.run("train", name, processes=processes, **changes).ok()
        return self.output(name)

    def train_as_a_user(self, name: str, processes: int = 1, **changes: Any) -> Path:
        """As ``train``, from the command line in a new process, through torchrun where there are several."""
        if processes > 1:
            changes = {"micro_batch_size": 1, **changes}
        args: list[Any] = [BIN / "axolotl", "train", self.config(name, **changes)]
        if processes > 1:
            args += ["--launcher", "torchrun", "--", "--nproc_per_node", processes, "--master_port", free_port()]
        else:
            args += ["--launcher", "python"]
        Command(args, self.folder / name / "train.log", self.repo).wait().ok()
        return self.output(name)

    def train_killed_and_resumed(
        self, name: str, processes: int = 1, auto: bool = False, then: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        """Train 3 steps, kill the processes after the checkpoint, resume as `then` says, and train 3 more."""
        if processes > 1:
            changes = {"micro_batch_size": 1, **changes}
        changes |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 20}
        checkpoint = self.output(name) / "checkpoint-3"
        running = self.start("train", name, processes=processes, **{**changes, "max_steps": 60})

        def trained_on() -> bool:
            return (checkpoint / "trainer_state.json").is_file() and running.text().count("'loss':") > 3

        running.wait_for(trained_on)
        running.kill()
        assert not (self.output(name) / "adapter_model.safetensors").exists()
        assert [path.name for path in self.output(name).glob("checkpoint-*")] == ["checkpoint-3"]
        resume = {"auto_resume_from_checkpoints": True} if auto else {"resume_from_checkpoint": str(checkpoint)}
        changes |= {"processes": processes, **resume, **(then or {})}
        log = self.run("train", name, **changes).ok().log
        assert log.count("'loss':") == 3, f"the run did not go on at step 4; the log ends with\n{log[-3000:]}"
        return self.output(name)

    def deepspeed(self, stage: str) -> str:
        return str(self.repo / "example_configs" / "deepspeed" / f"{stage}.json")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A random two-layer Llama in float32 with SmolLM2's tokenizer; its table has no room for markers."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), smollm2_dir, tied=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """The same with one table for both ends."""
    return write_tiny_model(tmp_path_factory.mktemp("tied"), smollm2_dir, tied=True)


def write_tiny_model(folder: Path, tokenizer: Path, tied: bool) -> Path:
    from kit import tiny_model
    from transformers import AutoTokenizer

    model = tiny_model(49152, tied=tied, hidden=64, initializer_range=0.02)
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def twelve_chains(tmp_path_factory: pytest.TempPathFactory, seed_chains: Path) -> Path:
    """Twelve chains: six batches of two are one epoch.

    An odd number of them holds an analysis, and an odd number a guidance. So in whatever order they come, some batch
    pairs a chain with a chain that lacks the step: with two processes, one of the ranks lacks it.
    """
    rows = [json.loads(line) for line in seed_chains.read_text(encoding="utf-8").splitlines()]
    full = [row for row in rows if row["guidance"]][:5]
    middle = [row for row in rows if row["analysis"] and not row["guidance"]][:2]
    middle += [{**row, "guidance": None} for row in rows if row["guidance"]][5 : 7 - len(middle)]
    short = [row for row in rows if not row["analysis"]][:5]
    chosen = full + middle + short
    assert (len(chosen), len(full) % 2, len(full + middle) % 2) == (12, 1, 1)
    path = tmp_path_factory.mktemp("data") / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tied_model: Path, twelve_chains: Path, repo: Path
) -> Workshop:
    start_server()  # before any thread and any test that changes the environment, which it inherits
    return Workshop(tmp_path_factory.mktemp("runs"), tiny_model, twelve_chains, repo, tied_model)


JOBS: dict[str, Callable[[Workshop, Runs], Any]] = {}


def job(function: Callable[[Workshop, Runs], Any]) -> Callable[[Workshop, Runs], Any]:
    """Register a single-process run that several tests look at, under its function's name."""
    JOBS[function.__name__] = function
    return function


class Runs:
    """Single-process runs, one after another in the background; ``get`` waits for one."""

    def __init__(self, workshop: Workshop, names: list[str], pool: ThreadPoolExecutor) -> None:
        # In the order of JOBS: a job may wait for one above it.
        self._futures: dict[str, Future[Any]] = {}
        for name in JOBS:
            if name in names:
                self._futures[name] = pool.submit(JOBS[name], workshop, self)

    def get(self, name: str) -> Any:
        return self._futures[name].result()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[Runs]:
    """The runs that the selected tests of a file name with ``@pytest.mark.needs``; workers take whole files."""
    items = [item for item in request.session.items if item.path == request.path]
    names = [name for item in items for mark in item.iter_markers("needs") for name in mark.args]
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield Runs(workshop, names, pool)
    finally:
        leave_nothing_running()
        pool.shutdown(cancel_futures=True)


@job
def reference(workshop: Workshop, runs: Runs) -> Path:
    """One process, micro-batch 2, six steps without a break."""
    return workshop.train_as_a_user("reference")


@job
def accumulated(workshop: Workshop, runs: Runs) -> Path:
    """As the reference, two micro-batches a step."""
    return workshop.train("accumulated", gradient_accumulation_steps=2)


@job
def tied(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train("tied", base_model=str(workshop.tied_model))


@job
def best(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train("best", **BEST)


@job
def resumed(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train_killed_and_resumed("resumed")


@job
def preprocessed(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("preprocess", "preprocessed", "--debug")


@job
def evaluated(workshop: Workshop, runs: Runs) -> Result:
    adapter = runs.get("reference")
    return workshop.run("evaluate", "evaluated", lora_model_dir=str(adapter))


@job
def answered(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("inference", "answered", text="How are you?\n", lora_model_dir=str(runs.get("reference")))


@job
def checkpointed(workshop: Workshop, runs: Runs) -> Path:
    kwargs = {"use_reentrant": False}
    return workshop.train("checkpointed", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


@job
def checkpointed_reentrant(workshop: Workshop, runs: Runs) -> Path:
    kwargs = {"use_reentrant": True}
    return workshop.train("checkpointed_reentrant", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


@job
def packed(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train(
        "packed",
        sample_packing=True,
        pad_to_sequence_len=True,
        max_steps=2,
        test_datasets=None,
        eval_strategy=None,
        eval_steps=None,
    )


@job
def lora(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train("lora", adapter="lora", lora_r=16, **PLAIN)


@job
def lora_again(workshop: Workshop, runs: Runs) -> Path:
    return workshop.train_as_a_user("lora_again", adapter="lora", lora_r=16, **PLAIN)


@job
def lora_evaluated(workshop: Workshop, runs: Runs) -> Result:
    adapter = runs.get("lora")
    changes = {"adapter": "lora", "lora_r": 16, **PLAIN}
    return workshop.run("evaluate", "lora_evaluated", lora_model_dir=str(adapter), **changes)


@job
def inference_refused(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("inference", "inference_refused")


@job
def merge_refused(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("merge-lora", "merge_refused", lora_model_dir=str(workshop.folder))


@job
def kernel_refused(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("train", "kernel_refused", lora_mlp_kernel=True)


@job
def unwritable(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("train", "unwritable", output_dir=str(workshop.chains / "out"))


@job
def bad_rows(workshop: Workshop, runs: Runs) -> Result:
    path = workshop.folder / "bad.jsonl"
    good = workshop.chains.read_text(encoding="utf-8").splitlines()[0]
    path.write_text(f'{good}\n{good}\n{{"messages": []}}\n{{oops\n', encoding="utf-8")
    return workshop.run("train", "bad_rows", datasets=[{"path": str(path), "type": "axolotl_mote.chain"}])


@job
def diverged(workshop: Workshop, runs: Runs) -> Result:
    saves = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    return workshop.run("train", "diverged", learning_rate=1e30, max_grad_norm=0.0, max_steps=4, **saves)


@job
def resumed_before_a_torn_checkpoint(workshop: Workshop, runs: Runs) -> Result:
    """Two more steps would follow checkpoint-4, but it was torn: four follow checkpoint-2."""
    name, changes = "torn", {"save_strategy": "steps", "save_steps": 2, "eval_strategy": None, "eval_steps": None}
    workshop.train(name, max_steps=4, **changes)
    torn = workshop.output(name) / "checkpoint-4" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    return workshop.run("train", name, auto_resume_from_checkpoints=True, **changes).ok()


@job
def interrupted(workshop: Workshop, runs: Runs) -> list[str]:
    """What three runs log: SIGTERM ends the first in the middle of checkpoint-4, SIGKILL the next in the last save.

    A pipe in the place of a file holds the process that opens it to write.
    """
    name, out, logs = "interrupted", workshop.output("interrupted"), []
    changes = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": None, "eval_steps": None}
    earlier = out / "checkpoint-4"  # of another run, which saved it whole
    earlier.mkdir(parents=True)
    (earlier / "trainer_state.json").write_text('{"global_step": 4}', encoding="utf-8")
    os.mkfifo(earlier / "optimizer.pt")
    running = workshop.start("train", name, **changes)
    running.wait_for((earlier / "training_args.bin").is_file)
    running.signal(signal.SIGTERM)
    result = running.wait()
    assert result.returncode == -signal.SIGTERM
    logs.append(result.log)
    (earlier / "optimizer.pt").unlink()

    running = workshop.start("train", name, auto_resume_from_checkpoints=True, **changes)
    running.wait_for(lambda: "'loss':" in running.text())
    config = out / "adapter_config.json"
    config.unlink()
    os.mkfifo(config)
    running.wait_for((out / "adapter_model.safetensors").is_file)
    running.kill()
    logs.append(running.text())
    config.unlink()

    result = workshop.run("train", name, auto_resume_from_checkpoints=True, **changes).ok()
    return [*logs, result.log]


@job
def full(workshop: Workshop, runs: Runs) -> Result:
    """The disk is full at the optimizer's state of the second checkpoint."""
    checkpoint = workshop.output("full") / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").symlink_to("/dev/full")
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": None, "eval_steps": None}
    return workshop.run("train", "full", **changes)


@job
def four_bit(workshop: Workshop, runs: Runs) -> Result:
    return workshop.run("train", "four_bit", load_in_4bit=True, max_steps=1)


BEST = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "learning_rate": 2.0,
}
"""At this rate the loss rises after the second checkpoint."""
PLAIN = {"mote": {}, **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)}
