"""Client for OpenAI-compatible servers: vLLM, TGI, SGLang, ``transformers serve``, hosted APIs.

    429, 408, 409, 425, 5xx, timeout, broken             retried with exponential back-off and full jitter, on another
    connection, a reply that is no completion            replica if there is one, for ``retry_for`` seconds; the replica
                                                         cools down, longer with every failure in a row
    Retry-After, x-ratelimit-remaining-* = 0             the replica cools down for as long as it asks
    401, 404, quota used up                              the same; if every replica says so, the build stops: no
                                                         question can succeed
    context too long, filtered                           recorded as refused or filtered; not asked again
    400, 403, 413, 422 once this replica has answered    the same: the question is at fault
    the same before its first answer                     retried on other replicas and while other requests are in
                                                         flight; if there are none, the build stops

If a call is not answered in time, its question is postponed to the next run and nothing is recorded for it. If no other
call was answered in that time either, the run stops. Each request carries a seed; servers may ignore it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random_exponential

from axolotl_mote.builder.clients.calls import (
    BudgetMeter,
    Call,
    CallPostponed,
    Completion,
    FatalCallError,
    NoServerResponding,
)
from axolotl_mote.builder.clients.cooldown import failure_cooldown, rate_limit_reset, retry_after
from axolotl_mote.builder.clients.replies import UnreadableReply, read_completion, read_error
from axolotl_mote.builder.settings import ServerModel, Stage

log = logging.getLogger(__name__)

_TOO_LONG = re.compile(r"context.{0,20}(?:length|window)|too (?:long|many tokens)|maximum.{0,30}tokens", re.IGNORECASE)


class _RetryableFault(Exception):
    """A fault that may pass."""


@dataclass
class _Replica:
    url: str
    proxy: str | None
    in_flight: int = 0
    cooldown_until: float = 0.0
    cooldown_reason: str = ""
    failures: int = 0  # in a row
    answered: bool = False
    rejection: str = ""  # its latest reply, if that was one
    hopeless: bool = False  # whether it rejects every question

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
        wrong = [url for url in spec.base_urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"base_urls must begin with http:// or https://; got {wrong[0]}. Correct the address.")
        self.spec, self._budget = spec, budget
        self._replicas = [_Replica(url.rstrip("/"), _proxy(url)) for url in spec.base_urls]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {key}", "User-Agent": "axolotl-mote"},
            timeout=aiohttp.ClientTimeout(total=None),  # ours also covers what comes drop by drop
            cookie_jar=aiohttp.DummyCookieJar(),
        )
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
                words = [str(error), *(r.rejection for r in self._replicas if r.rejection not in str(error))]
                self._not_responding = NoServerResponding(
                    f"no server answered for {self.spec.retry_for:g} s: {'; '.join(words)}"
                )
                raise self._not_responding from error
            raise CallPostponed(f"{call.key}: {error}") from error
        self._answers += 1
        self._budget.finish(completion)
        return completion

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def _send(self, call: Call, stage: Stage, deadline: float) -> Completion:
        replica = await self._reserve(deadline)
        try:
            if self._not_responding is not None:  # another call found out; this one need not wait as well
                raise self._not_responding
            self._budget.start()
            async with asyncio.timeout(self.spec.timeout):
                where = f"{replica.url}/chat/completions"
                async with self._session.post(where, json=self._body(call, stage), proxy=replica.proxy) as reply:
                    body = await reply.read()
            if reply.status >= 300:
                return self._read_status(reply.status, reply.headers, body, replica)
            completion = read_completion(body, self.spec.model)
            replica.failures, replica.answered, replica.rejection, replica.hopeless = 0, True, "", False
            replica.cool_down(rate_limit_reset(reply.headers), "rate limit used up")
            return completion
        except UnreadableReply as error:
            raise self._failed(replica, f"broken reply: {error}") from error
        except TimeoutError as error:
            raise self._failed(replica, f"no answer within {self.spec.timeout} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._failed(replica, f"no connection: {error}") from error
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
            **self.spec.extra_body,
        }

    def _read_status(self, status: int, headers: Mapping[str, str], body: bytes, replica: _Replica) -> Completion:
        """Decide what an error status means; see the table at the top."""
        words, code = read_error(body)
        words = f"status {status}: {words}"
        if (
            status < 400
            or status >= 500
            or status in (408, 409, 425)
            or (status == 429 and code != "insufficient_quota")
        ):
            raise self._failed(replica, words, retry_after(headers))
        may_be_the_question = status in (400, 403, 413, 422)
        if may_be_the_question:
            if code == "content_filter":
                return Completion(words, "filtered", model=self.spec.model)
            if code == "context_length_exceeded" or _TOO_LONG.search(words) or replica.answered:
                return Completion(words, "refused", model=self.spec.model)
        replica.rejection, replica.hopeless = f"{replica.url}: {words}", not may_be_the_question
        if not all(other.rejection for other in self._replicas):
            raise self._failed(replica, words)
        # A key without rights gives 403, and a resumed build may use another key: then only this run's answers count.
        if may_be_the_question and (self._answers > 0 or (self._answered_before and status != 403)):
            return Completion(words, "refused", model=self.spec.model)
        others = sum(other.in_flight for other in self._replicas if not other.hopeless) - (not replica.hopeless)
        if others > 0:  # they will show whether the question is at fault
            raise _RetryableFault(replica.rejection)
        rejections = "; ".join(other.rejection for other in self._replicas)
        raise FatalCallError(f"the server must accept our requests; got {rejections}. Check model, address and key.")

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


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address. (aiohttp's own way also reads .netrc, at every call.)"""
    address = urlsplit(url)
    found = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    return found if found and found.startswith("http") else None


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info("attempt %d failed, retrying: %s", state.attempt_number, error)
