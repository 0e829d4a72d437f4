"""The step grammar for a batch of requests whose lengths differ: which token may come next. No vLLM.

`generation.grammar` says what a plan and a budget are, and is the oracle in the tests. Here every request has its own,
nothing waits for the device, and no mask of the size of the vocabulary is kept per request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import ADAPTIVE, CHECK, parse_form
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.generation.grammar import UNLIMITED, make_budget, make_plan
from axolotl_mote.model.routing import marker_kinds, step_ids_from_kinds

STEPS, LIMIT = "steps", "step_limit"
"""What a request asks for: "adaptive" or the names of its steps; the most text tokens of a step."""

CONTRADICTING = ("allowed_token_ids", "bad_words", "min_tokens", "structured_outputs")
"""Parameters of sampling that could leave no token of a valid chain."""

CONTRADICTING_REQUEST = ("tools", "stop_token_ids", "use_beam_search", *CONTRADICTING)
"""Options of a request that could do so; formats besides."""

CONTRADICTION = "{} must be left out of a request with steps; a chain has its own form. Remove it."


LIMIT_ALONE = "step_limit must come with steps; got none. Add steps: 'adaptive'."


def check_request(values: Mapping[str, Any], vocabulary: StepVocabulary, max_tokens: int | None) -> None:
    """Check what a request asks for before it is admitted.

    Args:
        values: ``steps``, and optionally ``step_limit``.
        vocabulary: Steps of the served adapter.
        max_tokens: Tokens of the whole chain; None: no limit.

    Raises:
        ValueError: If steps are unknown or out of order, or the limits cannot hold the chain.
    """
    _plan_and_budget(values, vocabulary, max_tokens)


def requested_steps(values: Mapping[str, Any]) -> Any:
    """What a request calls its steps: "adaptive", a list of names, or anything that is wrong."""
    steps = values[STEPS]
    return parse_form(steps) if isinstance(steps, str) and steps != ADAPTIVE else steps


def _plan_and_budget(values: Mapping[str, Any], vocabulary: StepVocabulary, max_tokens: int | None) -> tuple[Any, Any]:
    steps, limit, names = values[STEPS], values.get(LIMIT), requested_steps(values)
    if isinstance(names, Sequence) and CHECK in names:
        raise ValueError("steps must not hold 'check' at a server. Use `axolotl-mote generate --check`.")
    if not isinstance(names, str) and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names) and names
    ):
        raise ValueError(f"steps must be 'adaptive' or a list of step names; got {steps!r}. Correct it.")
    if limit is not None and not (type(limit) is int and limit <= UNLIMITED):
        raise ValueError(f"step_limit must be a whole number up to {UNLIMITED}; got {limit!r}. Correct it.")
    plan = make_plan(names, vocabulary)
    try:
        return plan, make_budget(plan, vocabulary, UNLIMITED if max_tokens is None else max_tokens, limit)
    except ValueError as error:  # in the words of a request
        raise ValueError(str(error).replace("max_new_tokens", "max_tokens").replace("step_limits", LIMIT)) from error


class StepTables:
    """Plans and budgets of the requests in an engine's slots.

    Args:
        codec: Steps, markers, special ids and size of the tokenizer.
        slots: Number of slots.
        device: Where the engine computes.

    Attributes:
        active: Slots with a request that asked for steps.
    """

    def __init__(self, codec: ChainCodec, slots: int, device: torch.device | str) -> None:
        self.codec, self.vocabulary = codec, codec.vocabulary
        self.active: set[int] = set()
        slots += 1  # a spare one, through which two can be swapped
        steps = self.vocabulary.num_steps
        integers = {"dtype": torch.int64, "device": device}
        self._on = torch.zeros(slots, dtype=torch.bool, device=device)
        self._follows = torch.zeros(slots, steps + 1, steps, dtype=torch.bool, device=device)
        self._cheapest = torch.zeros_like(self._follows)
        self._limits, self._due = (torch.zeros(slots, steps + 1, **integers) for _ in range(2))  # type: ignore[call-overload]
        self._cost = torch.zeros(slots, steps, **integers)  # type: ignore[call-overload]
        self._total = torch.zeros(slots, **integers)  # type: ignore[call-overload]
        self._special = torch.tensor(
            [*self.vocabulary.start_ids, *self.vocabulary.end_ids, codec.stop_id], device=device
        )
        self._not_text: Tensor | None = None

    def __len__(self) -> int:
        """Number of slots, the spare one behind them included."""
        return len(self._on)

    def put(self, slot: int, values: Mapping[str, Any] | None, max_tokens: int | None) -> bool:
        """Take a request into a slot, in place of the one before.

        A request that breaks the rules was not admitted through the server's front; it gets an empty answer.

        Returns:
            Whether it asked for steps.
        """
        self._on[slot] = values is not None
        self.active.discard(slot)
        if values is None:
            return False
        self.active.add(slot)
        steps = self.vocabulary.num_steps
        follows = torch.zeros(2, steps + 1, steps, dtype=torch.bool)
        limits, due, cost, total = [1] * (steps + 1), [0] * (steps + 1), [0] * steps, 0
        try:
            plan, budget = _plan_and_budget(values, self.vocabulary, max_tokens)
        except ValueError:
            pass
        else:
            for step, after in enumerate(plan.follows):
                follows[0, step, [k - 1 for k in after]] = True
                follows[1, step, [k - 1 for k in after[-1:]]] = True
            limits, due, cost, total = list(budget.limits), list(budget.due), list(budget.cost[1:]), budget.total
        self._follows[slot], self._cheapest[slot] = follows.to(self._on.device)
        for table, row in ((self._limits, limits), (self._due, due), (self._cost, cost), (self._total, total)):
            table[slot] = torch.tensor(row, device=table.device)
        return True

    def move(self, source: int, target: int) -> None:
        """Copy what a slot holds to another."""
        for table in (self._on, self._follows, self._cheapest, self._limits, self._due, self._cost, self._total):
            table[target] = table[source]
        (self.active.add if source in self.active else self.active.discard)(target)

    def mask(self, logits: Tensor, slots: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Set the logits of inadmissible tokens to minus infinity, for the requests that asked for steps.

        Args:
            logits: (N, V).
            slots: Slot of each row, (N,), int64.
            tokens: Generated tokens of each row from the first one on, (N, L); columns from its length on are ignored.
            lengths: Number of generated tokens, (N,), int64.

        Returns:
            Logits, (N, V).
        """
        text_allowed, special_allowed = self._allowed(slots, tokens, lengths)
        if self._not_text is None or len(self._not_text) != logits.shape[-1]:
            self._not_text = self._not_text_ids(logits.shape[-1], logits.device)
        barred = self._not_text | ~text_allowed[:, None]  # (N, V)
        barred[:, self._special] = ~special_allowed
        return logits.masked_fill(barred & self._on[slots][:, None], float("-inf"))

    def _allowed(self, slots: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Whether text may come next, (N,), and which of start markers, end markers and stop, (N, 2S + 1)."""
        steps = self.vocabulary.num_steps
        index = torch.arange(tokens.shape[1], device=tokens.device)
        kinds = marker_kinds(tokens, self.vocabulary).masked_fill(index >= lengths[:, None], 0)
        ids = step_ids_from_kinds(F.pad(kinds, (0, 1)))  # a column more: the step of a text token that comes next
        opened = ids.gather(1, lengths[:, None])[:, 0]
        seen = torch.where(F.pad(index, (0, 1), value=tokens.shape[1]) < lengths[:, None], ids, 0)  # (N, L + 1)
        place = (torch.arange(seen.shape[1], device=seen.device) * (seen > 0)).amax(1)
        step = torch.where(opened > 0, opened, seen.gather(1, place[:, None])[:, 0])  # open, or the last complete one
        count = lengths - ((index + 1) * (kinds != 0)).amax(1) if tokens.shape[1] else lengths
        left = self._total[slots] - lengths
        row = step[:, None]
        limit, due = (table[slots].gather(1, row)[:, 0] for table in (self._limits, self._due))
        must_close = (opened > 0) & (count > 0) & ((count >= limit) | (left <= 1 + due))
        text = (opened > 0) & ~must_close
        expanded = row[:, :, None].expand(-1, 1, steps)
        follows, cheapest = (t[slots].gather(1, expanded)[:, 0] for t in (self._follows, self._cheapest))
        affordable = (self._cost[slots] <= left[:, None]) | cheapest
        between = (opened == 0)[:, None]
        starts = follows & affordable & between
        ends = (torch.arange(1, steps + 1, device=row.device) == opened[:, None]) & (count > 0)[:, None]
        stop = between & ~follows.any(1, keepdim=True)
        return text, torch.cat([starts, ends, stop], dim=1)

    def _not_text_ids(self, width: int, device: torch.device) -> Tensor:
        """Which ids may not stand inside a step, (V,)."""
        barred = torch.zeros(width, dtype=torch.bool)
        barred[[token for token in self.codec.special_ids if token < width]] = True
        barred[len(self.codec.tokenizer) :] = True
        return barred.to(device)
