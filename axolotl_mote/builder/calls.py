"""What a client is asked, what it gives back, and how it can fail. It knows no client."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Messages = list[dict[str, str]]
Finish = Literal["stop", "length", "filtered", "refused"]


class BuildStopped(Exception):
    """Base of everything that ends a build early. Work done so far is in the journal."""


class FatalCallError(BuildStopped):
    """A server turned a call down, and every other one would be: wrong key, unknown model, wrong path."""


class BudgetReached(BuildStopped):
    """The budget of this run is used up."""


class ServersSilent(BuildStopped):
    """No server of a model answered anything for as long as a call is tried."""


class CallPutOff(Exception):
    """One call did not succeed in time, though others did; its question is asked again by the next run."""


@dataclass(frozen=True)
class Call:
    """One request to a model. ``key`` names it within its build: question, stage, round, attempt."""

    question_id: str
    stage: str
    round: int
    attempt: int
    messages: Messages
    seed: int

    @property
    def key(self) -> str:
        return f"{self.question_id}/{self.stage}.{self.round}.{self.attempt}"


@dataclass(frozen=True)
class Completion:
    """What came back.

    Attributes:
        text: The generated text, as it came.
        finish: stop; length (token limit reached); filtered (by the server's content filter); refused (the server will
            never take this request, for example because it is too long; ``text`` holds its words).
        prompt_tokens, completion_tokens: As counted by the client, or estimated where a server does not say.
        model: Model name and, where given, fingerprint, as reported by who answered.
    """

    text: str
    finish: Finish
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""


def call_seed(seed: int, question_id: str, stage: str, round: int, attempt: int) -> int:
    """The seed of one call: depends on what is asked, not on when or beside what. Below 2**31."""
    name = f"{seed}/{question_id}/{stage}/{round}/{attempt}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


class BudgetMeter:
    """Counts requests and tokens of one run.

    Args:
        requests, tokens: Limits, or None.
    """

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self._max_requests, self._max_tokens = requests, tokens
        self.requests = self.tokens = 0

    def start(self, requests: int = 1) -> None:
        """Count requests about to be sent.

        Raises:
            BudgetReached: If the budget does not allow them.
        """
        if self._max_requests is not None and self.requests + requests > self._max_requests:
            raise BudgetReached(f"budget.requests reached: {self.requests} of {self._max_requests} sent in this run.")
        if self._max_tokens is not None and self.tokens >= self._max_tokens:
            raise BudgetReached(f"budget.tokens reached: {self.tokens} of {self._max_tokens} used in this run.")
        self.requests += requests

    def finish(self, completion: Completion) -> None:
        """Count the tokens of a completion."""
        self.tokens += completion.prompt_tokens + completion.completion_tokens
