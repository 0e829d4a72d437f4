"""`StepVocabulary`: the steps of a model and their marker ids, and the rule that gives a token its step.

The rule is written once, in ``advance``. ``model.routing`` implements it for tensors; the parser and the streamer call
it token by token. Plain Python; no tokenizer, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from axolotl_mote.chain.steps import CHECK, answer_step, reasoning_steps


def advance(open_step: int, kind: int) -> tuple[int, int]:
    """The rule that gives a token its step, one token forward.

    A token between a start marker and its end marker, both included, has that step. A start marker without an end keeps
    its step until another start marker or the end of the document. Everything else is the question, step 0.
    Example: kinds 0, +1, 0, -1, 0 (text, start of step 1, text, its end, text) give the steps 0, 1, 1, 1, 0.

    Args:
        open_step: Step that is open before the token; 0 at the start of a document.
        kind: +k if the token starts step k, -k if it ends step k, 0 for any other token.

    Returns:
        The token's step, and the step that is open after it.
    """
    step = kind if kind > 0 else open_step
    return step, 0 if kind == -step else step


@dataclass(frozen=True)
class StepVocabulary:
    """The steps of a model and the ids of their markers.

    Args:
        steps: Step names in order; step ids are 1-based positions in it.
        start_ids: Id of each step's start marker.
        end_ids: Id of each step's end marker.
    """

    steps: tuple[str, ...]
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    @classmethod
    def from_marker_ids(cls, steps: Sequence[str], marker_ids: Sequence[int]) -> StepVocabulary:
        """From ids in the order of ``steps.markers``: start before end, step by step."""
        return cls(tuple(steps), tuple(marker_ids[0::2]), tuple(marker_ids[1::2]))

    @property
    def marker_ids(self) -> list[int]:
        """Ids in the order of ``steps.markers``: start before end, step by step."""
        return [token for pair in zip(self.start_ids, self.end_ids, strict=True) for token in pair]

    @property
    def num_steps(self) -> int:
        """Number of steps S; step ids run from 1 to S, 0 is the question."""
        return len(self.steps)

    @property
    def answer(self) -> str:
        """Name of the step the user sees."""
        return answer_step(self.steps)

    @property
    def has_check(self) -> bool:
        """Whether the model was trained to judge its own answer."""
        return self.steps[-1] == CHECK

    @property
    def reasoning(self) -> tuple[str, ...]:
        """The steps before the answer, in order."""
        return reasoning_steps(self.steps)

    def fixed_forms(self) -> list[list[str]]:
        """The answer alone, then with one reasoning step more each time, up to all of them."""
        return [[*self.reasoning[:depth], self.answer] for depth in range(len(self.reasoning) + 1)]

    @cached_property
    def kinds(self) -> dict[int, int]:
        """Marker id -> +k for the start of step k, -k for its end; other tokens are absent and count as 0."""
        starts = {token: k for k, token in enumerate(self.start_ids, 1)}
        ends = {token: -k for k, token in enumerate(self.end_ids, 1)}
        return starts | ends

    def step_ids(self, tokens: Iterable[int]) -> list[int]:
        """The step of every token of one document; see ``advance``."""
        open_step, steps = 0, []
        for token in tokens:
            step, open_step = advance(open_step, self.kinds.get(token, 0))
            steps.append(step)
        return steps

    def step_id(self, name: str) -> int:
        """The 1-based id of a step.

        Raises:
            ValueError: If the model has no such step.
        """
        if name not in self.steps:
            raise ValueError(
                f"steps must name steps of this adapter, {list(self.steps)}; got {name!r}. Correct the name."
            )
        return self.steps.index(name) + 1
