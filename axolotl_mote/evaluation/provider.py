"""The inspect_ai provider ``mote/DIR``: systems of this process, answering the samples of an evaluation in batches.

    inspect eval axolotl_mote/xstest --model mote/outputs/mote -M steps=adaptive

DIR is a MoTE adapter, a plain LoRA trained on chains, or a base model (or its hub name). Requests with equal settings
are gathered into batches; modes can differ from sample to sample (``GenerateConfig(extra_body={"steps": "verify"})``).
Each reasoning step, or the think block of a base model, comes back as a ``ContentReasoning`` and the answer alone as a
``ContentText``, so that scorers see what a user sees. A model is loaded at its first request; ``close`` frees it if no
one else uses it. Works on asyncio and trio. torch is imported when a model is named, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from axolotl_mote.chain.codec import ROLES
from axolotl_mote.evaluation.compat import sample_state

if TYPE_CHECKING:
    from axolotl_mote.evaluation.systems import Answer, Settings, SharedSystem

_UNSUPPORTED: dict[str, Any] = {
    "stop_seqs": [],
    "num_choices": 1,
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "prompt_logprobs": None,
    "response_schema": None,
    "modalities": [],
    "fallback_models": [],
    "effort": None,
    "verbosity": None,
    "reasoning_effort": None,
    "reasoning_mode": None,
    "reasoning_tokens": None,
    "reasoning_summary": None,
}
"""What inspect_ai can ask for and a chain cannot give -> the value that asks for nothing."""

_INSTEAD = {
    "stop_seqs": "A chain ends with its own marker: remove it",
    "num_choices": "Use epochs, with a temperature and a seed",
    "best_of": "Use epochs, with a temperature and a seed",
}

_OF_REQUEST = ("steps", "check")
"""Keys of ``extra_body``."""


class MoteAPI(ModelAPI):
    """A system as an inspect_ai model; see the module's docstring.

    Args:
        model_name: DIR.
        base_url, api_key: Must be None: nothing is served.
        config: From inspect_ai.
        steps: adaptive (default), verify, or a form such as ``analysis+response``; for a base model none.
        base_model: Base model of the adapter; default: the one it was trained on.
        dtype: Type of the base model's weights; "auto" keeps that of the checkpoint.
        device: Such as cpu or cuda:0; default: the first GPU, else the CPU.
        batch_size: Questions decoded together.
        max_new_tokens: Tokens of a whole chain where the config gives no ``max_tokens``; default 2048, or as many as
            the context leaves.
        check: Let the trained check step judge the answer.
        seed: Seed of sampling where the config gives none.
        **unknown: Refused.

    Raises:
        ValueError: If DIR is no system, or an argument does not suit it.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        steps: str | list[str] | None = None,
        base_model: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int | None = None,
        check: bool = False,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(model_name=model_name, config=config or GenerateConfig())
        for key, value in {"base_url": base_url, "api_key": api_key}.items():
            if value is not None:
                raise ValueError(f"{key} must be left out for mote/DIR, which serves nothing; got one. Remove it.")
        if unknown:
            raise ValueError(f"-M must name an argument of mote/DIR; got {', '.join(unknown)}. Correct the name.")
        _check_integer("batch_size", batch_size, least=1)
        _check_integer("max_new_tokens", max_new_tokens, least=1)
        _check_integer("seed", seed, least=0)
        _check_switch("check", check)

        from axolotl_mote.evaluation import systems

        self.spec = systems.find_system(
            model_name, base_model, dtype=str(dtype), device=None if device is None else str(device)
        )
        self._vocabulary = systems.vocabulary_of(self.spec)
        self._steps = systems.parse_steps(steps, self._vocabulary, check)
        self._check, self._batch_size, self._max_new_tokens, self._seed = check, batch_size, max_new_tokens, seed
        self._system: SharedSystem | None = None

    # --- what inspect_ai asks ---------------------------------------------------------------------------------------

    def max_connections(self) -> int:
        """One batch that is answered and one that waits."""
        return 2 * self._batch_size

    def connection_key(self) -> str:
        """Each system has connections of its own."""
        return repr(self.spec)

    def close(self) -> None:
        """Free the model, if no one else uses it; the next request loads it again."""
        from axolotl_mote.evaluation import systems

        system, self._system = self._system, None
        if system is not None:
            systems.release(system)

    async def aclose(self) -> None:
        """As ``close``, without holding up the event loop."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one dialogue.

        Raises:
            ValueError: If the dialogue cannot be answered, or the config asks for what a chain cannot give.
        """
        if tools:
            raise ValueError(
                f"tools must be empty; got {', '.join(tool.name for tool in tools)}. Use a task without tools."
            )
        settings = self._settings(config)
        messages = dialogue_of(input)
        return self._output(await _result(self._open().submit(messages, settings, self._batch_size)))

    # --- in and out -------------------------------------------------------------------------------------------------

    def _open(self) -> SharedSystem:
        from axolotl_mote.evaluation import systems

        if self._system is None or self._system.closed:
            self._system = systems.acquire(self.spec)
        return self._system

    def _settings(self, config: GenerateConfig) -> Settings:
        """How to answer one request.

        Raises:
            ValueError: If the config asks for what a chain cannot give.
        """
        from axolotl_mote.evaluation.systems import Settings, parse_steps

        for key, nothing in _UNSUPPORTED.items():
            value = getattr(config, key)
            if value is not None and value != nothing:
                remedy = _INSTEAD.get(key, "Remove it")
                raise ValueError(f"{key} must be left out for mote/DIR; got {value!r}. {remedy}.")
        of_request = dict(config.extra_body or {})
        if unknown := [key for key in of_request if key not in _OF_REQUEST]:
            raise ValueError(f"extra_body must hold {' or '.join(_OF_REQUEST)}; got {unknown}. Remove the rest.")
        temperature, top_p, top_k = config.temperature, config.top_p, config.top_k
        if temperature is None and ((top_p or 1.0) != 1.0 or top_k):
            key, value = ("top_p", top_p) if (top_p or 1.0) != 1.0 else ("top_k", top_k)
            raise ValueError(f"{key} must come with a temperature; got {value} without one. Set temperature.")
        if (temperature or 0.0) < 0:
            raise ValueError(f"temperature must be at least 0; got {temperature}. Use 0 for greedy decoding.")
        check, steps = of_request.get("check", self._check), self._steps
        _check_switch("check", check)
        if of_request:
            steps = parse_steps(of_request.get("steps", self._steps), self._vocabulary, check)
        max_tokens = config.max_tokens if config.max_tokens is not None else self._max_new_tokens
        _check_integer("max_tokens", max_tokens, least=1)
        sample = sample_state()
        samples = bool(temperature)
        return Settings(
            steps=steps,
            check=check,
            max_new_tokens=max_tokens,
            temperature=temperature or 0.0,
            top_p=(top_p or 1.0) if samples else 1.0,
            top_k=(top_k or 0) if samples else 0,
            seed=(config.seed if config.seed is not None else self._seed) if samples else None,
            draw=sample.epoch if samples and sample is not None else 1,
        )

    def _output(self, answer: Answer) -> ModelOutput:
        parts: list[Any] = [
            ContentReasoning(reasoning=text, internal={"step": step}) for step, text in answer.reasoning.items()
        ]
        message = ChatMessageAssistant(
            content=[*parts, ContentText(text=answer.answer)], model=self.model_name, source="generate"
        )
        stop_reason = "max_tokens" if answer.truncated else "stop"
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=stop_reason)],
            usage=ModelUsage(
                input_tokens=answer.input_tokens,
                output_tokens=answer.output_tokens,
                total_tokens=answer.input_tokens + answer.output_tokens,
                reasoning_tokens=sum(answer.token_counts[step] for step in answer.reasoning),
            ),
            metadata={
                "mote": {
                    "has_steps": self._vocabulary is not None,
                    "steps": list(answer.texts),
                    "texts": answer.texts,
                    "token_counts": answer.token_counts,
                    "finished": answer.finished,
                    "truncated": list(answer.truncated),
                    "check": answer.check,
                }
            },
        )


@modelapi(name="mote")
def mote() -> type[ModelAPI]:
    """The provider ``mote/DIR``."""
    return MoteAPI


def dialogue_of(input: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages of inspect_ai as a dialogue; of an earlier answer the text alone, without its reasoning.

    Raises:
        ValueError: If a message holds anything but text, or is of a tool.
    """
    dialogue = []
    for number, message in enumerate(input):
        where = f"message {number}"
        if message.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}; got {message.role!r} at {where}. Use a task without tools.")
        if getattr(message, "tool_calls", None):
            raise ValueError(f"tool_calls must be empty; got some at {where}. Use a task without tools.")
        parts = [] if isinstance(message.content, str) else message.content
        for part in parts:
            if part.type not in ("text", "reasoning"):
                raise ValueError(f"content must be text; got {part.type} at {where}. Use a task of texts.")
        dialogue.append({"role": message.role, "content": message.text})
    return dialogue


async def _result(future: Future[Any]) -> Any:
    """Wait for a future of another thread; who is cancelled cancels it."""
    done = anyio.Event()
    wake = _thread_safe(done.set)
    future.add_done_callback(lambda _: wake())
    try:
        await done.wait()
    finally:
        future.cancel()
    if future.cancelled():
        raise RuntimeError("system must stay open until it has answered; it was released. Ask again.")
    return future.result()


def _thread_safe(callback: Callable[[], object]) -> Callable[[], None]:
    """A function for other threads that runs a callback on the running event loop, and does not wait for it."""
    loop: Any = current_token().native_token
    schedule = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # asyncio, trio

    def wake() -> None:
        with suppress(RuntimeError):  # the loop has ended, and so has the one who waited
            schedule(callback)

    return wake


def _check_integer(key: str, value: Any, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(f"{key} must be a whole number of at least {least}; got {value!r}. Correct it.")


def _check_switch(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false; got {value!r}. Correct it.")
