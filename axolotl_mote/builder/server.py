"""Client for OpenAI-compatible servers: vLLM, TGI, SGLang, ``transformers serve``, hosted APIs.

    429, 408, 409, 5xx, time-out, broken connection,     tried again with exponential back-off and full jitter, on
    broken JSON, reply without choices                   another replica if there is one, for ``retry_for`` seconds;
                                                         that replica rests, longer with every failure in a row
    Retry-After, x-ratelimit-remaining-* = 0             that replica rests as long as it asks for
    401, 404, quota used up                              the build stops: no question could succeed
    context too long, filtered                           the text is recorded as refused or filtered; not asked again
    400, 403, 413, 422 once something was answered       likewise: it is the question's fault
    the same before the first answer                     tried again while other requests are in flight; if there are
                                                         none, the build stops

A call that was not answered in time puts its question off to the next run; nothing is recorded for it. If no other call
was answered in that time either, the run stops. Seeds are sent along; whether a server honours them is its affair. It
knows nothing about chains.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random_exponential

from axolotl_mote.builder.calls import BudgetMeter, Call, CallPutOff, Completion, FatalCallError, ServersSilent
from axolotl_mote.builder.settings import ServerModel, Stage

log = logging.getLogger(__name__)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNIT_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TOO_LONG = re.compile(r"context.{0,20}(?:length|window)|too (?:long|many tokens)|maximum.{0,30}tokens", re.IGNORECASE)


class _TryAgain(Exception):
    """A fault that may pass."""


class _Unreadable(Exception):
    """A reply that is no completion."""


@dataclass
class _Replica:
    url: str
    client: openai.AsyncOpenAI
    in_flight: int = 0
    rests_until: float = 0.0
    rests_because: str = ""
    failures: int = 0  # in a row


class ServerClient:
    """Sends calls to the replicas of one model, the least busy one first.

    Args:
        spec: The model.
        budget: Shared by all clients of a run.
        answered: Whether an earlier run got answers: then a request the server rejects is the question's fault.

    Raises:
        ValueError: If the environment variable for the API key is not set.
    """

    def __init__(self, spec: ServerModel, budget: BudgetMeter, answered: bool = False) -> None:
        key = os.environ.get(spec.api_key_env, "") if spec.api_key_env else "none"
        if not key:
            raise ValueError(
                f"api_key_env must name a set environment variable; got {spec.api_key_env}. Export it first."
            )
        self.spec, self._budget = spec, budget
        self._replicas = [
            _Replica(url, openai.AsyncOpenAI(base_url=url, api_key=key, timeout=spec.timeout, max_retries=0))
            for url in spec.base_urls
        ]
        self._change = asyncio.Condition()
        self._answered_before = answered
        self._answers = 0
        self._silent: ServersSilent | None = None

    @property
    def concurrency(self) -> int:
        """Requests that may be in flight at once, over all replicas."""
        return self.spec.concurrency * len(self._replicas)

    async def complete(self, call: Call, stage: Stage) -> Completion:
        """Send a call until it is answered.

        Raises:
            CallPutOff: If it was not answered within ``retry_for`` seconds, but another call was.
            ServersSilent: If no call was.
            FatalCallError: If no call can succeed.
            BudgetReached: If the budget does not allow a further request.
        """
        deadline, answers = time.monotonic() + self.spec.retry_for, self._answers
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            wait=wait_random_exponential(multiplier=self.spec.backoff, max=self.spec.backoff_max),
            stop=stop_after_delay(self.spec.retry_for),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    completion = await self._send(call, stage, deadline)
        except _TryAgain as error:
            if self._answers == answers:
                self._silent = ServersSilent(f"no server answered for {self.spec.retry_for:g} s: {error}")
                raise self._silent from error
            raise CallPutOff(f"{call.key}: {error}") from error
        self._answers += 1
        self._budget.finish(completion)
        return completion

    async def aclose(self) -> None:
        """Close all connections."""
        for replica in self._replicas:
            await replica.client.close()

    async def _send(self, call: Call, stage: Stage, deadline: float) -> Completion:
        replica = await self._take(deadline)
        try:
            if self._silent is not None:  # another call found out; this one need not wait for its own time to end
                raise self._silent
            self._budget.start()
            async with asyncio.timeout(self.spec.timeout):  # of the whole request; the client's own is between bytes
                raw = await replica.client.chat.completions.with_raw_response.create(**self._body(call, stage))
            completion = _read(raw.parse())
            replica.failures = 0
            _rest(replica, _limit_rest(raw.headers), "rate limit used up")
            return completion
        except (JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError, _Unreadable) as error:
            raise self._failed(replica, f"broken reply: {error}") from error
        except (TimeoutError, openai.APITimeoutError) as error:
            raise self._failed(replica, f"no answer within {self.spec.timeout} s") from error
        except openai.APIConnectionError as error:
            raise self._failed(replica, f"no connection: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            return self._status(error, replica)
        finally:
            async with self._change:
                replica.in_flight -= 1
                self._change.notify_all()

    def _failed(self, replica: _Replica, why: str, asked: float = 0.0) -> _TryAgain:
        """Count a failure and let the replica rest, so that others are preferred; the first in a row is shown.

        Args:
            replica: Which failed.
            why: How.
            asked: Seconds that it asks to be left alone; 0: longer with every failure in a row.
        """
        counts = replica.rests_until <= time.monotonic()  # of what was in flight together, only the first does
        replica.failures += counts
        level = logging.WARNING if counts and replica.failures == 1 else logging.INFO
        log.log(level, "%s: %s; trying again", replica.url, why)
        growing = self.spec.backoff * 2 ** min(replica.failures - 1, 16)
        _rest(replica, asked or min(self.spec.backoff_max, growing), why)
        return _TryAgain(f"{replica.url}: {why}")

    def _body(self, call: Call, stage: Stage) -> dict[str, Any]:
        return {
            "model": self.spec.model,
            "messages": call.messages,
            "temperature": stage.temperature,
            "top_p": stage.top_p,
            "seed": call.seed,
            self.spec.token_limit_key: stage.max_new_tokens,
            "extra_body": self.spec.extra_body or None,
        }

    def _status(self, error: openai.APIStatusError, replica: _Replica) -> Completion:
        """Decide what an error status means; see the table at the top."""
        status, words = error.status_code, f"{replica.url}: {error}"
        if status >= 500 or status in (408, 409, 425) or (status == 429 and error.code != "insufficient_quota"):
            raise self._failed(replica, str(error), _retry_after(error.response.headers)) from error
        if status in (400, 403, 413, 422):
            if error.code == "content_filter":
                return Completion(str(error), "filtered", model=self.spec.model)
            if error.code == "context_length_exceeded" or _TOO_LONG.search(str(error)) or self._accepts_others(status):
                return Completion(str(error), "refused", model=self.spec.model)
            if sum(r.in_flight for r in self._replicas) > 1:  # their answers will tell whose fault it is
                raise _TryAgain(words) from error
        raise FatalCallError(
            f"the server must accept our requests; got {words}. Check model, address and key."
        ) from error

    def _accepts_others(self, status: int) -> bool:
        """Whether this server has answered, so that an error is the question's fault.

        A key without rights gives 403, and a resumed build may have another key: there only this run's answers count.
        """
        return self._answers > 0 or (self._answered_before and status != 403)

    async def _take(self, deadline: float) -> _Replica:
        """Wait for a replica that is awake and has room, and reserve a place in it."""
        async with self._change:
            while True:
                now = time.monotonic()
                roomy = [r for r in self._replicas if r.in_flight < self.spec.concurrency]
                awake = [r for r in roomy if r.rests_until <= now]
                if awake:
                    replica = min(awake, key=lambda r: (r.failures, r.in_flight))
                    replica.in_flight += 1
                    return replica
                first = min(self._replicas, key=lambda r: r.rests_until)
                if first.rests_until > deadline:
                    raise _TryAgain(f"{first.url}: {first.rests_because}; it rests for {first.rests_until - now:.1f} s")
                wake = min((r.rests_until for r in roomy), default=None)
                try:
                    async with asyncio.timeout(None if wake is None else wake - now):
                        await self._change.wait()
                except TimeoutError:
                    pass


def _read(reply: Any) -> Completion:
    """A parsed reply as a completion; raises _Unreadable if it is none."""
    if not isinstance(reply, ChatCompletion) or not isinstance(reply.choices, list) or not reply.choices:
        raise _Unreadable("no choices")
    choice, usage = reply.choices[0], reply.usage
    message = getattr(choice, "message", None)
    if message is None:
        raise _Unreadable("no message")
    text = message.content or getattr(message, "refusal", None) or ""
    if not isinstance(text, str):
        raise _Unreadable("content that is no text")
    finish = {"length": "length", "content_filter": "filtered"}.get(choice.finish_reason or "stop", "stop")
    name = f"{reply.model}@{reply.system_fingerprint}" if reply.system_fingerprint else str(reply.model)
    # Servers that do not count are charged four characters a token, so that a token budget still ends.
    used = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, len(text) // 4 + 1)
    return Completion(text, finish, *used, model=name)  # type: ignore[arg-type]


def _rest(replica: _Replica, seconds: float, why: str) -> None:
    if seconds > 0:
        until = time.monotonic() + seconds
        if until > replica.rests_until:
            replica.rests_until, replica.rests_because = until, why
            log.info("%s rests for %.1f s: %s", replica.url, seconds, why)


def _retry_after(headers: Any) -> float:
    """Seconds that retry-after-ms or Retry-After (seconds or a date) asks to wait; 0 if none does."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "")
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time()) if value else _limit_rest(headers)
    except (TypeError, ValueError):
        return 0.0


def _limit_rest(headers: Any) -> float:
    """Seconds until a used-up limit is reset, by x-ratelimit-remaining-* and -reset-* ("1s", "6m0s", "20ms")."""
    waits = [0.0]
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            reset = headers.get(f"x-ratelimit-reset-{kind}", "")
            parts = _DURATION.findall(reset)
            waits.append(sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts))
    return max(waits)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info("attempt %d failed, trying again: %s", state.attempt_number, error)
