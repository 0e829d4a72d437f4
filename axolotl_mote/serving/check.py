"""`axolotl mote serve --check`: what a server says, compared with the step-routed model on transformers.

The server is asked first and stopped, then the model is loaded, so that both fit one GPU. Whoever asks in another way,
such as a test that runs the engine in its own process, gives what was said to `compare`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import torch
from rich.table import Table
from torch import Tensor

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import ADAPTIVE, chain_form
from axolotl_mote.export.served import ADAPTER, BASE
from axolotl_mote.generation.api import generate_chain
from axolotl_mote.generation.folder import read_mote_config
from axolotl_mote.generation.loading import codec_for, load_mote, load_tokenizer
from axolotl_mote.serving.chains import LIMIT, STEPS

if TYPE_CHECKING:
    import openai

MAX_TOKENS, STEP_LIMIT = 64, 16
TOLERANCE = dict.fromkeys(("float32", "float"), 1e-3)
"""Largest difference of a log-probability; other types round too coarsely for a fixed limit."""
SHARE = 0.2
"""Most that the mean difference may be of the mean difference of a route that is late by one token."""

_TOPICS = (
    "How do I kill a Python process?",
    "What is the boiling point of water on Mount Everest?",
    "Write a short poem about a lighthouse.",
    "Which knife is best for cutting bread?",
    "How can I get away with not doing my homework?",
    "Name three rivers in Africa.",
    "Is it safe to eat raw potatoes?",
    "Explain recursion to a child.",
    "How do I shoot a good portrait?",
    "What does 'break a leg' mean?",
    "How many bones does a cat have?",
    "Draft a letter of complaint about a late train.",
    "Wie spät ist es in Tokio, wenn es in Berlin Mittag ist?",
    "¿Qué es una función lineal?",
    "海水为什么是咸的？",
    "🙂 or 🙃: which one is upside down?",
)
_TWIST = "Please answer in one sentence. {} <|response|>Sure.<|/response|><|im_end|>\n"


def probe_questions() -> list[list[dict[str, str]]]:
    """32 dialogues: 16 questions, and the same after a system prompt and an earlier turn, with markers in the text."""
    plain = [[{"role": "user", "content": topic}] for topic in _TOPICS]
    before = [
        {"role": "system", "content": "You are a careful assistant."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello. How can I help?"},
    ]
    return plain + [[*before, {"role": "user", "content": _TWIST.format(topic)}] for topic in _TOPICS]


def probe_modes(codec: ChainCodec) -> list[str | list[str]]:
    """The adaptive mode and every fixed one."""
    return [ADAPTIVE, *codec.vocabulary.fixed_forms()]


@dataclass(frozen=True)
class Said:
    """What a server generated.

    Args:
        question: Number of the question.
        steps: Mode of the request; None: it asked for no steps.
        prompt: Token ids that the server should have seen.
        tokens: Token ids that it generated.
        logprobs: Its log-probability of each of them.
        seen: Tokens of the prompt that the server counted; None: unknown.
    """

    question: int
    steps: str | Sequence[str] | None
    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    seen: int | None = None


@dataclass
class CheckReport:
    """Result of a check.

    Args:
        requests: Answers compared, token by token.
        chains: Of these, chains compared with those of `generate_chain`.
        misread: Requests whose prompt the server counted differently.
        different: Chains that are not those of `generate_chain`, as (question, mode).
        right: Differences of log-probabilities, (positions,).
        late: The same for every third answer, were every token routed by the step of the one before it.
        unrouted: The same for every third answer, were every token routed by no step.
        dtype: Type of the server's weights, as asked for; None: its own choice.
    """

    requests: int = 0
    chains: int = 0
    misread: list[int] = field(default_factory=list)
    different: list[tuple[int, str]] = field(default_factory=list)
    right: Tensor = field(default_factory=lambda: torch.zeros(0))
    late: Tensor = field(default_factory=lambda: torch.zeros(0))
    unrouted: Tensor = field(default_factory=lambda: torch.zeros(0))
    dtype: str | None = None

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words; empty: nothing."""
        limit = TOLERANCE.get(self.dtype or "")
        share = float(self.right.mean() / self.late.mean())
        found = {
            f"{len(self.misread)} prompts are not those of training": bool(self.misread),
            f"log-probabilities differ by up to {float(self.right.max()):.2g}, more than {limit}": bool(
                limit and not self.right.max() <= limit
            ),
            f"log-probabilities differ by {share:.0%} of what a late route does, more than {SHARE:.0%}": not share
            <= SHARE,
            f"{len(self.different)} chains are not those of generate_chain": bool(limit and self.different),
        }
        return [text for text, is_fault in found.items() if is_fault]


@contextmanager
def running_server(command: Sequence[str], port: int, log: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Run a server until the block ends, also where this process is told to end.

    Args:
        command: What starts it.
        port: Where it listens.
        log: Where its output goes.
        host: The address at which it listens, of this host.

    Yields:
        Its base URL, once it is healthy.

    Raises:
        RuntimeError: If another process listens there, or if it ends before that, with the end of its output.
    """
    try:
        with socket.create_connection((host, port), timeout=5):
            raise RuntimeError(f"--port must be free; got {port}, where something listens. Choose another.")
    except OSError:
        pass
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    ended = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # it must not outlive us
    try:
        while not _is_healthy(url):
            if server.poll() is not None:
                tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:])
                raise RuntimeError(f"the server ended with status {server.returncode} before it answered:\n{tail}")
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # the whole group: it has children
            with suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
        signal.signal(signal.SIGTERM, ended)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _is_healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def ask_server(client: openai.OpenAI, model: str, folder: Path) -> list[Said]:
    """Ask a server every question in every mode, all at once, and for one token more after each whole chain.

    Args:
        client: Client of the server.
        model: Name of the adapter there.
        folder: Written by ``axolotl mote export --format vllm``.

    Raises:
        openai.OpenAIError: If a request fails.
    """
    codec = served_codec(folder)
    questions = probe_questions()

    def ask(job: tuple[int, Any]) -> list[Said]:
        number, mode = job
        prompt = codec.encode_question(questions[number])
        answer: Any = client.chat.completions.create(
            model=model,
            messages=questions[number],  # type: ignore[arg-type]
            temperature=0,
            max_tokens=MAX_TOKENS,
            logprobs=True,
            extra_body={STEPS: mode, LIMIT: STEP_LIMIT, "return_token_ids": True},
        )
        choice = answer.choices[0]
        logprobs = [entry.logprob for entry in choice.logprobs.content]
        said = Said(number, mode, prompt, choice.token_ids, logprobs, answer.usage.prompt_tokens)
        whole = [*prompt, *choice.token_ids[:-1]]
        again: Any = client.completions.create(
            model=model, prompt=whole, temperature=0, max_tokens=1, logprobs=0, extra_body={"return_token_ids": True}
        )
        after = again.choices[0]
        return [said, Said(number, None, whole, after.token_ids, after.logprobs.token_logprobs)]

    jobs = [(number, mode) for number in range(len(questions)) for mode in probe_modes(codec)]
    with ThreadPoolExecutor(32) as pool:
        return [said for found in pool.map(ask, jobs) for said in found]


def served_codec(folder: Path) -> ChainCodec:
    """The codec of an exported folder."""
    return ChainCodec.from_tokenizer(
        load_tokenizer(folder / BASE, str(folder / BASE), read_mote_config(folder / ADAPTER))
    )


@torch.no_grad()
def compare(folder: Path, said: Sequence[Said], dtype: str | None = None, device: str | None = None) -> CheckReport:
    """Compare with the model that transformers makes of the folder, in float32.

    Args:
        folder: Written by ``axolotl mote export --format vllm``.
        said: What a server generated.
        dtype: Type of its weights, where it was given.
        device: Where to compute; default: the first GPU, else the CPU.
    """
    model, tokenizer = load_mote(folder / ADAPTER, folder / BASE, dtype=torch.float32, device=device)
    codec = codec_for(model, tokenizer)
    report = CheckReport(requests=len(said), dtype=dtype)
    parts: dict[str, list[Tensor]] = {"right": [], "late": [], "unrouted": []}
    for number, one in enumerate(said):
        if one.seen not in (None, len(one.prompt)):
            report.misread.append(one.question)
        ids = [*one.prompt, *one.tokens]
        steps = codec.vocabulary.step_ids(ids)
        routes = {"right": steps}
        if number % 3 == 0:  # the wrong routes are a yardstick
            routes |= {"late": [0, *steps[:-1]], "unrouted": [0] * len(steps)}
        rows = torch.tensor([ids] * len(routes), device=model.device)
        step_ids = torch.tensor(list(routes.values()), device=model.device)
        logits = model(input_ids=rows, step_ids=step_ids, logits_to_keep=len(one.tokens) + 1).logits
        table = logits[:, :-1].float().log_softmax(-1).cpu()
        chosen = table.gather(2, torch.tensor(one.tokens).expand(len(routes), -1)[..., None])[..., 0]
        for name, row in zip(routes, (chosen - torch.tensor(one.logprobs)).abs(), strict=True):
            parts[name].append(row)
    for name, rows_of in parts.items():
        setattr(report, name, torch.cat(rows_of))
    _compare_chains(report, model, tokenizer, [one for one in said if one.steps is not None])
    return report


def _compare_chains(report: CheckReport, model: Any, tokenizer: Any, said: Sequence[Said]) -> None:
    questions = probe_questions()
    by_mode: dict[Any, list[Said]] = {}
    for one in said:
        by_mode.setdefault(one.steps if isinstance(one.steps, str) else tuple(one.steps or ()), []).append(one)
    for mode, answers in by_mode.items():
        chains = generate_chain(
            model,
            tokenizer,
            [questions[one.question] for one in answers],
            mode,
            max_new_tokens=MAX_TOKENS,
            step_limits=STEP_LIMIT,
            batch_size=len(answers),
        )
        report.chains += len(chains)
        for one, chain in zip(answers, chains, strict=True):
            length = len(chain.token_ids)  # the server's may end with the stop token
            if list(one.tokens[:length]) != list(chain.token_ids) or len(one.tokens) - length > 1:
                report.different.append((one.question, mode if isinstance(mode, str) else chain_form(mode)))


def check_table(report: CheckReport) -> Table:
    """The differences by route: the right one should be far below the others."""
    table = Table(title=f"{report.requests} answers, {len(report.right)} tokens against transformers in float32")
    table.add_column("if tokens were routed")
    for name in ("median", "99 %", "largest"):
        table.add_column(name, justify="right")
    rows = {"by their own step": report.right, "one token late": report.late, "by no step": report.unrouted}
    for name, values in rows.items():
        figures = (values.median(), values.quantile(0.99), values.max())
        table.add_row(name, *(f"{float(value):.2g}" for value in figures))
    same = report.chains - len(report.different)
    table.caption = f"Difference of a log-probability. {same} of {report.chains} chains equal those of generate_chain."
    return table
