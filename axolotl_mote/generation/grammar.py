"""Which token may come next, so that every generated chain is a valid one.

    question, (start of an allowed step, text, its end)+, end of turn

`Plan` says which step may follow which, `Budget` how many tokens each may take, `StepGrammar` turns both into a logits
processor. Its state is a function of ``input_ids`` alone, so that rows may switch steps at different times and beam
search, cropping and assisted decoding see the grammar of the row they really hold. It knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from axolotl_mote.generation.vocabulary import StepVocabulary
from axolotl_mote.steps import CHECK

ADAPTIVE = "adaptive"
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
        follows: Step ids that may follow each step, cheapest way to the end last.
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
    """Turn what the user asked for into a plan.

    Args:
        steps: "adaptive", or the steps of the chain in order, the answer among them.
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
class Budget:
    """How many tokens a chain and each of its steps may take, and what is kept back for the steps still due.

    Args:
        total: Tokens of the whole chain, markers included.
        limits: Most text tokens of each step; index 0 is unused.
        due: Tokens kept back after each step, for the shortest valid rest of the chain; index 0: before the first step.
        cost: Tokens a step must find left to be opened; index 0 is unused.
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
) -> Budget:
    """Spread a token budget over the steps, so that the answer is never starved by the reasoning before it.

    Up to a quarter of the total (at most 128 tokens) is kept for the answer and up to 32 for every other step that is
    still due.

    Args:
        plan: Which step may follow which.
        vocabulary: The steps.
        total: Tokens of the whole chain, markers included.
        step_limits: Most text tokens of a step: one number for all, or one per step name.
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
    return Budget(total, tuple(limits), due, cost)


def _reaches(plan: Plan, step: int) -> bool:
    """Whether the chain can still be completed after this step (steps outside a fixed plan lead nowhere)."""
    return step == plan.last or bool(plan.follows[step])


class StepGrammar(LogitsProcessor):
    """Admit only tokens that keep the chain valid.

    Inside a step: ordinary text, and its end marker once there is text; the end marker alone when the step's limit or
    the budget is used up. Between steps: start markers the plan allows and the budget can pay. After the last step:
    only `stop_id`. A step with `choices` (the verdict of ``check``) admits exactly those texts.

    Args:
        vocabulary: The steps and their markers.
        plan: Which step may follow which.
        budget: Tokens of the chain and of each step.
        banned: Ids that may never stand inside a step.
        prompt_length: Length of the (left-padded) prompt; everything after it was generated.
        stop_id: Token admitted after the chain is complete.
        after: Step that is complete when the prompt ends; 0: none.
        num_tokens: Size of the tokenizer; ids from there on are padding of the output head, never text.
        choices: Step id -> the token sequences that are its only valid texts.
    """

    def __init__(
        self,
        vocabulary: StepVocabulary,
        plan: Plan,
        budget: Budget,
        *,
        banned: frozenset[int],
        prompt_length: int,
        stop_id: int,
        after: int = 0,
        num_tokens: int | None = None,
        choices: Mapping[int, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.plan = plan
        self.budget = budget
        self.banned = banned
        self.prompt_length = prompt_length
        self.stop_id = stop_id
        self.after = after
        self.num_tokens = num_tokens
        self.choices = {k: [list(text) for text in texts] for k, texts in (choices or {}).items()}
        self._steps = len(vocabulary.steps)
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
        if left < tables.dearest:
            allowed = allowed & ~self._too_dear(state, step, left, tables)
        for k, options in tables.options.items():
            fits = self._choice_mask(generated, begin, count, options, width)
            allowed = torch.where((state == k)[:, None], fits, allowed)
        return scores.masked_fill(~allowed, float("-inf"))  # type: ignore[return-value]

    def must_close(self, step: int, count: int, emitted: int) -> bool:
        """Whether a step with `count` text tokens, `emitted` tokens into the generation, is closed by force."""
        return count >= self.budget.limits[step] or self.budget.total - emitted <= 1 + self.budget.due[step]

    def _state(self, generated: torch.Tensor, tables: _Tables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Signed step of each row (+k open, -k or 0 between), its text tokens so far, and where its text begins."""
        rows, emitted = generated.shape
        kind = tables.kind[generated]  # (B, T): +k start of step k, -k its end, 0 text
        places = torch.arange(1, emitted + 1, device=generated.device)
        begin = (places * (kind != 0)).amax(dim=1) if emitted else places.new_zeros(rows)
        padded = torch.cat([kind.new_full((rows, 1), -self.after), kind], dim=1)
        state = padded.gather(1, begin[:, None])[:, 0]
        return state, emitted - begin, begin

    def _too_dear(self, state: torch.Tensor, step: torch.Tensor, left: int, tables: _Tables) -> torch.Tensor:
        """Start markers the rest of the budget cannot pay; the cheapest way to the end always stays open."""
        barred = (tables.cost > left)[None, :] & ~tables.cheapest[step] & (state <= 0)[:, None]  # (B, S)
        mask = torch.zeros(len(state), tables.width, dtype=torch.bool, device=state.device)
        mask[:, tables.starts] = barred
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
        """Everything that depends on the vocabulary only, built once."""
        steps, starts, ends = self._steps, list(self.vocabulary.start_ids), list(self.vocabulary.end_ids)
        text = torch.ones(width, dtype=torch.bool)
        text[[token for token in self.banned if token < width]] = False
        if self.num_tokens is not None:
            text[self.num_tokens :] = False
        allowed = torch.zeros(1 + 4 * steps, width, dtype=torch.bool)
        cheapest = torch.zeros(1 + steps, steps, dtype=torch.bool)
        for j, follows in enumerate(self.plan.follows):
            allowed[j, [starts[k - 1] for k in follows] or [self.stop_id]] = True
            if follows:
                cheapest[j, follows[-1] - 1] = True
        for k in range(1, steps + 1):
            row = 1 + steps + 3 * (k - 1)
            allowed[row] = text
            allowed[row + 1] = text
            allowed[row + 1 : row + 3, ends[k - 1]] = True
        kind = torch.zeros(max(width, *starts, *ends) + 1, dtype=torch.long)
        for token, value in self.vocabulary.kinds().items():
            kind[token] = value
        options = {k: self._padded_options(k, texts).to(device) for k, texts in self.choices.items()}
        return _Tables(
            width=width,
            allowed=allowed.to(device),
            kind=kind.to(device),
            limits=torch.tensor(self.budget.limits, device=device),
            due=torch.tensor(self.budget.due, device=device),
            cost=torch.tensor(self.budget.cost[1:], device=device),
            dearest=max(self.budget.cost[1:]),
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
    kind: torch.Tensor  # (V,)
    limits: torch.Tensor  # (S + 1,)
    due: torch.Tensor  # (S + 1,)
    cost: torch.Tensor  # (S,)
    dearest: int
    cheapest: torch.Tensor  # (S + 1, S)
    starts: torch.Tensor  # (S,)
    options: dict[int, torch.Tensor]
