"""What a client is asked, what it gives back, and how it can fail. No client is imported here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from axolotl_mote.chain.questions import Messages

Finish = Literal["stop", "length", "filtered", "refused", "tool_call", "only_reasoning"]
NO_TEXT: frozenset[Finish] = frozenset({"tool_call", "only_reasoning"})
"""Ways to finish without a text; each is the name of a defect."""


class BuildStopped(Exception):
    """Base of everything that ends a build early. The journal holds the work done so far."""


class FatalCallError(BuildStopped):
    """A server rejected a call and would reject every other one: wrong key, unknown model, wrong path."""


class BudgetReached(BuildStopped):
    """The budget of this run is used up."""


class NoServerResponding(BuildStopped):
    """No server of a model answered any call for ``retry_for`` seconds."""


class CallPostponed(Exception):
    """One call was not answered in time, though others were; the next run asks its question again."""


@dataclass(frozen=True)
class Call:
    """One request to a model; ``key`` is its name within the build."""

    question_id: str
    stage: str
    round: int
    attempt: int
    messages: Messages
    seed: int

    @property
    def key(self) -> str:
        """``QUESTION/STAGE.ROUND.ATTEMPT``."""
        return f"{self.question_id}/{self.stage}.{self.round}.{self.attempt}"


@dataclass(frozen=True)
class Completion:
    """What came back.

    Attributes:
        text: The generated text, unchanged.
        finish: stop; length (token limit reached); filtered (by the server's content filter); refused (this request can
            never be answered, for example because it is too long; ``text`` holds the reason); tool_call or
            only_reasoning (what came instead of a text).
        prompt_tokens, completion_tokens: As counted by the client, or estimated where a server does not say.
        model: Name of the model that answered and, where given, its fingerprint.
    """

    text: str
    finish: Finish
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""


def call_seed(seed: int, question_id: str, stage: str, round: int, attempt: int) -> int:
    """The seed of one call, below 2**31. It depends on what is asked, not on when or in which batch."""
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
        """Count requests that are about to be sent.

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
