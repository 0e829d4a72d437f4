"""Client for OpenAI-compatible servers: vLLM, TGI, SGLang, ``transformers serve``, hosted APIs.

    429, 408, 409, 425, 5xx, timeout, broken             retried with exponential back-off and full jitter, on another
    connection, broken JSON, reply without choices       replica if there is one, for ``retry_for`` seconds; the replica
                                                         cools down, longer with every failure in a row
    Retry-After, x-ratelimit-remaining-* = 0             the replica cools down for as long as it asks
    401, 404, quota used up                              the build stops: no question can succeed
    context too long, filtered                           recorded as refused or filtered; not asked again
    400, 403, 413, 422 once something was answered       the same: the question is at fault
    the same before the first answer                     retried while other requests are in flight; if there are none,
                                                         the build stops

If a call is not answered in time, its question is postponed to the next run and nothing is recorded for it. If no other
call was answered in that time either, the run stops. Each request carries a seed; servers may ignore it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random_exponential

from axolotl_mote.builder.clients.calls import (
    BudgetMeter,
    Call,
    CallPostponed,
    Completion,
    FatalCallError,
    Finish,
    NoServerResponding,
)
from axolotl_mote.builder.clients.cooldown import failure_cooldown, rate_limit_reset, retry_after
from axolotl_mote.builder.settings import ServerModel, Stage

log = logging.getLogger(__name__)

_TOO_LONG = re.compile(r"context.{0,20}(?:length|window)|too (?:long|many tokens)|maximum.{0,30}tokens", re.IGNORECASE)
_FINISHES: dict[str, Finish] = {"length": "length", "content_filter": "filtered"}


class _RetryableFault(Exception):
    """A fault that may pass."""


class _UnreadableReply(Exception):
    """A reply that is not a completion."""


@dataclass
class _Replica:
    url: str
    client: openai.AsyncOpenAI
    in_flight: int = 0
    cooldown_until: float = 0.0
    cooldown_reason: str = ""
    failures: int = 0  # in a row

    def cool_down(self, seconds: float, reason: str) -> None:
        """Send nothing for some seconds; a shorter cooldown than the present one changes nothing."""
        until = time.monotonic() + seconds
        if seconds > 0 and until > self.cooldown_until:
            self.cooldown_until, self.cooldown_reason = until, reason
            log.info("%s cools down for %.1f s: %s", self.url, seconds, reason)


class ServerClient:
    """Sends calls to the replicas of one model, the least busy one first.

    Args:
        spec: The model.
        budget: Shared by all clients of a run.
        answered: Whether an earlier run got answers; then the question is at fault if the server rejects it.

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
        self._not_responding: NoServerResponding | None = None

    async def complete(self, call: Call, stage: Stage) -> Completion:
        """Send a call until it is answered.

        Raises:
            CallPostponed: If it was not answered within ``retry_for`` seconds, but another call was.
            NoServerResponding: If no call was.
            FatalCallError: If no call can succeed.
            BudgetReached: If the budget does not allow another request.
        """
        deadline, answers = time.monotonic() + self.spec.retry_for, self._answers
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_RetryableFault),
            wait=wait_random_exponential(multiplier=self.spec.backoff, max=self.spec.backoff_max),
            stop=stop_after_delay(self.spec.retry_for),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    completion = await self._send(call, stage, deadline)
        except _RetryableFault as error:
            if self._answers == answers:
                self._not_responding = NoServerResponding(f"no server answered for {self.spec.retry_for:g} s: {error}")
                raise self._not_responding from error
            raise CallPostponed(f"{call.key}: {error}") from error
        self._answers += 1
        self._budget.finish(completion)
        return completion

    async def aclose(self) -> None:
        """Close all connections."""
        for replica in self._replicas:
            await replica.client.close()

    async def _send(self, call: Call, stage: Stage, deadline: float) -> Completion:
        replica = await self._reserve(deadline)
        try:
            if self._not_responding is not None:  # another call found out; this one need not wait as well
                raise self._not_responding
            self._budget.start()
            async with asyncio.timeout(self.spec.timeout):  # the whole request; the client's own is between two bytes
                raw = await replica.client.chat.completions.with_raw_response.create(**self._body(call, stage))
            completion = _read(raw.parse())
            replica.failures = 0
            replica.cool_down(rate_limit_reset(raw.headers), "rate limit used up")
            return completion
        except (JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError, _UnreadableReply) as error:
            raise self._failed(replica, f"broken reply: {error}") from error
        except (TimeoutError, openai.APITimeoutError) as error:
            raise self._failed(replica, f"no answer within {self.spec.timeout} s") from error
        except openai.APIConnectionError as error:
            raise self._failed(replica, f"no connection: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            return self._read_status(error, replica)
        finally:
            async with self._change:
                replica.in_flight -= 1
                self._change.notify_all()

    def _failed(self, replica: _Replica, reason: str, requested: float = 0.0) -> _RetryableFault:
        """Count a failure and let the replica cool down, so that others are preferred.

        Args:
            replica: The replica that failed.
            reason: Shown as a warning for the first failure in a row.
            requested: Seconds that the replica asks for; 0: longer with every failure in a row.
        """
        first = replica.cooldown_until <= time.monotonic()  # of requests in flight together, only the first counts
        replica.failures += first
        level = logging.WARNING if first and replica.failures == 1 else logging.INFO
        log.log(level, "%s: %s; retrying", replica.url, reason)
        growing = failure_cooldown(replica.failures, self.spec.backoff, self.spec.backoff_max)
        replica.cool_down(requested or growing, reason)
        return _RetryableFault(f"{replica.url}: {reason}")

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

    def _read_status(self, error: openai.APIStatusError, replica: _Replica) -> Completion:
        """Decide what an error status means; see the table at the top."""
        status, words = error.status_code, f"{replica.url}: {error}"
        if status >= 500 or status in (408, 409, 425) or (status == 429 and error.code != "insufficient_quota"):
            raise self._failed(replica, str(error), retry_after(error.response.headers)) from error
        if status in (400, 403, 413, 422):
            if error.code == "content_filter":
                return Completion(str(error), "filtered", model=self.spec.model)
            if error.code == "context_length_exceeded" or _TOO_LONG.search(str(error)) or self._accepts_others(status):
                return Completion(str(error), "refused", model=self.spec.model)
            if sum(r.in_flight for r in self._replicas) > 1:  # the others will show whether the question is at fault
                raise _RetryableFault(words) from error
        raise FatalCallError(
            f"the server must accept our requests; got {words}. Check model, address and key."
        ) from error

    def _accepts_others(self, status: int) -> bool:
        """Whether this server has answered, so that the question is at fault.

        A key without rights gives 403, and a resumed build may use another key: for 403 only this run's answers count.
        """
        return self._answers > 0 or (self._answered_before and status != 403)

    async def _reserve(self, deadline: float) -> _Replica:
        """Wait for a replica that has room and does not cool down, and reserve a place in it."""
        async with self._change:
            while True:
                now = time.monotonic()
                with_room = [r for r in self._replicas if r.in_flight < self.spec.concurrency]
                ready = [r for r in with_room if r.cooldown_until <= now]
                if ready:
                    replica = min(ready, key=lambda r: (r.failures, r.in_flight))
                    replica.in_flight += 1
                    return replica
                first = min(self._replicas, key=lambda r: r.cooldown_until)
                if first.cooldown_until > deadline:
                    left = first.cooldown_until - now
                    raise _RetryableFault(f"{first.url}: {first.cooldown_reason}; it cools down for {left:.1f} s")
                next_ready = min((r.cooldown_until for r in with_room), default=None)
                try:
                    async with asyncio.timeout(None if next_ready is None else next_ready - now):
                        await self._change.wait()
                except TimeoutError:
                    pass


def _read(reply: Any) -> Completion:
    """A parsed reply as a completion.

    Raises:
        _UnreadableReply: If it is not a completion.
    """
    if not isinstance(reply, ChatCompletion) or not isinstance(reply.choices, list) or not reply.choices:
        raise _UnreadableReply("no choices")
    choice, usage = reply.choices[0], reply.usage
    message = getattr(choice, "message", None)
    if message is None:
        raise _UnreadableReply("no message")
    text = message.content or getattr(message, "refusal", None) or ""
    if not isinstance(text, str):
        raise _UnreadableReply("content that is not a string")
    name = f"{reply.model}@{reply.system_fingerprint}" if reply.system_fingerprint else str(reply.model)
    # For servers that do not count tokens, four characters are one token, so that a token budget still ends the run.
    used = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, len(text) // 4 + 1)
    return Completion(text, _FINISHES.get(choice.finish_reason, "stop"), *used, model=name)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info("attempt %d failed, retrying: %s", state.attempt_number, error)
