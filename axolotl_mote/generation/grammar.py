"""Which token may come next, so that every generated chain is a valid one.

    question, (start of an allowed step, text, its end)+, end of turn

`Plan` says which step may follow which, `TokenBudget` how many tokens each may take; `StepGrammar` turns both into a
logits processor. Its state is a function of ``input_ids`` alone: rows may switch steps at different times, and beam
search, cropping and assisted decoding always see the grammar of the row they hold. No models here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from axolotl_mote.chain.codec import ChainCodec
from axolotl_mote.chain.steps import ADAPTIVE, CHECK
from axolotl_mote.chain.vocabulary import StepVocabulary
from axolotl_mote.model.routing import step_ids_from_kinds

UNLIMITED = 1 << 30
_ANSWER_RESERVE = 128
_STEP_RESERVE = 32


@dataclass(frozen=True)
class Plan:
    """Which step may follow which.

    For the steps analysis, guidance, response the adaptive plan is ``follows = ((1, 3), (2, 3), (3,), ())``: row j
    holds what may come after step j, row 0 what may open the chain. A reasoning step may only follow the one directly
    before it, as in the data. The fixed plan ["analysis", "response"] is ``((1,), (3,), (), ())``.

    Args:
        follows: Step ids that may follow each step; the one on the cheapest way to the end comes last.
        answer: Id of the answer step.
        last: Id of the step whose end marker ends the turn.
    """

    follows: tuple[tuple[int, ...], ...]
    answer: int
    last: int

    def route(self, after: int) -> tuple[int, ...]:
        """The shortest list of steps that completes the chain after the given step."""
        route: list[int] = []
        while after != self.last:
            after = self.follows[after][-1]
            route.append(after)
        return tuple(route)


def make_plan(steps: str | Sequence[str], vocabulary: StepVocabulary, check: bool = False) -> Plan:
    """Turn the user's choice of steps into a plan.

    Args:
        steps: "adaptive", or the steps of the chain in order, the answer among them.
        vocabulary: The steps.
        check: Let the trained check step follow the answer (a fixed list may also just name it).

    Raises:
        ValueError: If a step is unknown, repeated or out of order, or if the answer is missing.
    """
    if check and not vocabulary.has_check:
        raise ValueError(
            f"check must name a trained step; this adapter has {list(vocabulary.steps)}. "
            "Train it with 'check' as the last step."
        )
    answer = vocabulary.step_id(vocabulary.answer)
    follows: list[tuple[int, ...]]
    if isinstance(steps, str):
        if steps != ADAPTIVE:
            raise ValueError(f"steps must be 'adaptive', 'verify' or a list of step names; got {steps!r}. Pass a list.")
        follows = [(j + 1, answer) if j + 1 < answer else (answer,) for j in range(answer)]
        chosen = tuple(range(1, answer + 1))
    else:
        chosen = _checked_ids(steps, vocabulary, answer)
        check = check or chosen[-1] > answer
        chosen = tuple(k for k in chosen if k <= answer)
        after = dict(zip((0, *chosen), chosen, strict=False))
        follows = [(after[j],) if j in after else () for j in range(answer)]
    rest: list[tuple[int, ...]] = [()] * (len(vocabulary.steps) - answer + 1)
    if check:
        rest[0] = (answer + 1,)
    return Plan(tuple(follows + rest), answer, answer + 1 if check else answer)


def _checked_ids(steps: Sequence[str], vocabulary: StepVocabulary, answer: int) -> tuple[int, ...]:
    ids = tuple(vocabulary.step_id(name) for name in steps)
    if list(ids) != sorted(set(ids)):
        raise ValueError(
            f"steps must follow the order of the adapter, {list(vocabulary.steps)}, each once; got {list(steps)}. "
            "Reorder them."
        )
    if answer not in ids:
        raise ValueError(f"steps must hold the answer step {vocabulary.answer!r}; got {list(steps)}. Add it.")
    return ids


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a chain and each of its steps may take, and how many are reserved for the steps still due.

    Args:
        total: Tokens of the whole chain, markers included.
        limits: Maximum text tokens of each step; index 0 is unused.
        due: Tokens reserved after each step, for the shortest way to complete the chain; index 0: before the first.
        cost: Tokens that must be left to open a step; index 0 is unused.
    """

    total: int
    limits: tuple[int, ...]
    due: tuple[int, ...]
    cost: tuple[int, ...]


def make_budget(
    plan: Plan,
    vocabulary: StepVocabulary,
    total: int,
    step_limits: int | Mapping[str, int] | None = None,
    verdict_tokens: int = 1,
    after: int = 0,
) -> TokenBudget:
    """Spread a token budget over the steps, so that reasoning never starves the answer.

    Up to a quarter of the total (at most 128 tokens) is reserved for the answer, and up to 32 for every other step that
    is still due.

    Args:
        plan: Which step may follow which.
        vocabulary: The steps.
        total: Tokens of the whole chain, markers included.
        step_limits: Maximum text tokens of a step: one number for all, or one per step name.
        verdict_tokens: Length of the longest verdict of the check step.
        after: Step that is already complete in the prompt.

    Raises:
        ValueError: If a limit is below 1, names an unknown step, or the total cannot hold the shortest chain.
    """
    count = len(vocabulary.steps)
    limits = [UNLIMITED] * (count + 1)
    if isinstance(step_limits, Mapping):
        for name, value in step_limits.items():
            limits[vocabulary.step_id(name)] = value
    elif step_limits is not None:
        limits = [step_limits] * (count + 1)
    if min(limits) < 1:
        raise ValueError(f"step_limits must be at least 1; got {step_limits}. Leave the step out of `steps` instead.")
    roomy = (min(_ANSWER_RESERVE, total // 4), min(_STEP_RESERVE, total // (4 * count)))
    for answer_text, step_text in (roomy, (1, 1)):
        text = [max(1, step_text)] * (count + 1)
        text[plan.answer] = max(1, answer_text)
        text = [min(want, limit) for want, limit in zip(text, limits, strict=True)]
        if vocabulary.steps[-1] == CHECK:
            text[-1] = verdict_tokens
            limits[-1] = UNLIMITED
        due = tuple(sum(text[k] + 2 for k in plan.route(j)) if _reaches(plan, j) else 0 for j in range(count + 1))
        if due[after] <= total:
            break
    else:
        raise ValueError(
            f"max_new_tokens must be at least {due[after]} for these steps (two markers and some text each); got "
            f"{total}. Raise it or ask for fewer steps."
        )
    cost = tuple(text[k] + 2 + due[k] for k in range(count + 1))
    return TokenBudget(total, tuple(limits), due, cost)


def _reaches(plan: Plan, step: int) -> bool:
    """Whether the chain can still be completed after this step (one outside a fixed plan leads nowhere)."""
    return step == plan.last or bool(plan.follows[step])


class StepGrammar(LogitsProcessor):
    """Admit only tokens that keep the chain valid.

    Inside a step: ordinary text, and its end marker once there is text; the end marker alone when the step's limit or
    the budget is used up. Between steps: start markers that the plan allows and the budget can afford. After the last
    step: only the codec's ``stop_id``. A step with ``choices`` (the verdict of ``check``) admits exactly those texts.

    Args:
        codec: Gives the steps, their markers, the ids that may not stand inside a step, and the size of the tokenizer;
            ids beyond that size are padding of the output head, never text.
        plan: Which step may follow which.
        budget: Tokens of the chain and of each step.
        prompt_length: Length of the (left-padded) prompt; everything after it was generated.
        after: Step that is complete when the prompt ends; 0: none.
        choices: Step id -> the token sequences that are its only valid texts.
    """

    def __init__(
        self,
        codec: ChainCodec,
        plan: Plan,
        budget: TokenBudget,
        *,
        prompt_length: int,
        after: int = 0,
        choices: Mapping[int, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        self.codec = codec
        self.vocabulary = codec.vocabulary
        self.plan = plan
        self.budget = budget
        self.prompt_length = prompt_length
        self.after = after
        self.choices = {k: [list(text) for text in texts] for k, texts in (choices or {}).items()}
        self._steps = self.vocabulary.num_steps
        self._tables: _Tables | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Set the scores of inadmissible tokens to minus infinity; input_ids (B, T), scores (B, V)."""
        width = scores.shape[-1]
        if self._tables is None or self._tables.allowed.device != scores.device or self._tables.width != width:
            self._tables = self._build_tables(width, scores.device)
        tables = self._tables
        generated = input_ids[:, self.prompt_length :].to(scores.device)
        emitted = generated.shape[1]
        state, count, begin = self._state(generated, tables)
        step = state.abs()
        left = self.budget.total - emitted
        close = (count >= tables.limits[step]) | (left <= 1 + tables.due[step])
        inside = torch.where(close & (count > 0), 2, (count > 0).long())  # 0: text, 1: text or end, 2: end
        # rows of the table: 0..S after step j, then three rows for each open step
        row = torch.where(state > 0, 1 + self._steps + 3 * (step - 1) + inside, step)
        allowed = tables.allowed[row]
        if left < tables.max_cost:
            allowed = allowed & ~self._unaffordable(state, step, left, tables)
        for k, options in tables.options.items():
            fits = self._choice_mask(generated, begin, count, options, width)
            allowed = torch.where((state == k)[:, None], fits, allowed)
        return scores.masked_fill(~allowed, float("-inf"))  # type: ignore[return-value]

    def must_close(self, step: int, count: int, emitted: int) -> bool:
        """Whether a step with `count` text tokens, `emitted` tokens into the generation, is closed by force."""
        return count >= self.budget.limits[step] or self.budget.total - emitted <= 1 + self.budget.due[step]

    def _state(self, generated: torch.Tensor, tables: _Tables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The state of each row.

        Args:
            generated: Tokens after the prompt, shape (B, T).
            tables: Lookup tables on the same device.

        Returns:
            Three tensors of shape (B,): +k if step k is open, else -k with k the last complete step (0: none); the
            text tokens since the last marker; the index where that text begins.
        """
        kinds = F.pad(tables.kinds[generated], (2, 1))  # (B, T + 3)
        kinds[:, 0], kinds[:, 1] = self.after, -self.after  # the step that is complete in the prompt
        steps = step_ids_from_kinds(kinds)  # the last column is the step of a text token that would come next
        index = torch.arange(kinds.shape[1], device=kinds.device)
        step = steps.gather(1, (index * (steps > 0)).amax(dim=1, keepdim=True))[:, 0]
        begin = ((index * (kinds != 0)).amax(dim=1) - 1).clamp(min=0)
        return torch.where(steps[:, -1] > 0, step, -step), generated.shape[1] - begin, begin

    def _unaffordable(self, state: torch.Tensor, step: torch.Tensor, left: int, tables: _Tables) -> torch.Tensor:
        """Start markers that the budget cannot afford, never those on the cheapest way to the end; (B, V)."""
        unaffordable = (tables.cost > left)[None, :] & ~tables.cheapest[step] & (state <= 0)[:, None]  # (B, S)
        mask = torch.zeros(len(state), tables.width, dtype=torch.bool, device=state.device)
        mask[:, tables.starts] = unaffordable
        return mask

    @staticmethod
    def _choice_mask(
        generated: torch.Tensor, begin: torch.Tensor, count: torch.Tensor, options: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Tokens that continue one of the options (O, L), each padded with its end marker; (B, V)."""
        length = options.shape[1]
        if not generated.shape[1]:
            generated = generated.new_full((len(begin), 1), -1)
        offsets = torch.arange(length, device=generated.device)
        place = (begin[:, None] + offsets).clamp(max=generated.shape[1] - 1)  # (B, L)
        text = generated.gather(1, place)
        same = (text[:, None, :] == options[None]) | (offsets >= count[:, None])[:, None, :]  # (B, O, L)
        following = options[:, count.clamp(max=length - 1)].T  # (B, O)
        mask = torch.zeros(len(begin), width, dtype=torch.int8, device=generated.device)
        mask.scatter_reduce_(1, following, same.all(dim=-1).to(torch.int8), reduce="amax")
        return mask.bool()

    def _build_tables(self, width: int, device: torch.device) -> _Tables:
        """Everything that does not depend on the tokens, built once."""
        steps, starts, ends = self._steps, list(self.vocabulary.start_ids), list(self.vocabulary.end_ids)
        text = torch.ones(width, dtype=torch.bool)
        text[[token for token in self.codec.special_ids if token < width]] = False
        text[len(self.codec.tokenizer) :] = False
        allowed = torch.zeros(1 + 4 * steps, width, dtype=torch.bool)
        cheapest = torch.zeros(1 + steps, steps, dtype=torch.bool)
        for j, follows in enumerate(self.plan.follows):
            allowed[j, [starts[k - 1] for k in follows] or [self.codec.stop_id]] = True
            if follows:
                cheapest[j, follows[-1] - 1] = True
        for k in range(1, steps + 1):
            row = 1 + steps + 3 * (k - 1)
            allowed[row] = text
            allowed[row + 1] = text
            allowed[row + 1 : row + 3, ends[k - 1]] = True
        kinds = torch.zeros(max(width, *starts, *ends) + 1, dtype=torch.long)
        for token, kind in self.vocabulary.kinds.items():
            kinds[token] = kind
        options = {k: self._padded_options(k, texts).to(device) for k, texts in self.choices.items()}
        return _Tables(
            width=width,
            allowed=allowed.to(device),
            kinds=kinds.to(device),
            limits=torch.tensor(self.budget.limits, device=device),
            due=torch.tensor(self.budget.due, device=device),
            cost=torch.tensor(self.budget.cost[1:], device=device),
            max_cost=max(self.budget.cost[1:]),
            cheapest=cheapest.to(device),
            starts=torch.tensor(starts, device=device),
            options=options,
        )

    def _padded_options(self, step: int, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        length = max(map(len, texts)) + 1
        end = self.vocabulary.end_ids[step - 1]
        return torch.tensor([list(text) + [end] * (length - len(text)) for text in texts])


@dataclass(frozen=True)
class _Tables:
    """Lookup tables of a grammar on one device; V ids, S steps."""

    width: int
    allowed: torch.Tensor  # (1 + 4S, V)
    kinds: torch.Tensor  # (V,): +k start of step k, -k its end, 0 text
    limits: torch.Tensor  # (S + 1,)
    due: torch.Tensor  # (S + 1,)
    cost: torch.Tensor  # (S,)
    max_cost: int
    cheapest: torch.Tensor  # (S + 1, S)
    starts: torch.Tensor  # (S,)
    options: dict[int, torch.Tensor]
