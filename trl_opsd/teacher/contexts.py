# SPDX-License-Identifier: Apache-2.0
"""What a teacher reads: from a group of rollouts to prompt templates, what stands in their slot, and weights.

A method names, for every rollout, the contexts its target is made of. Each context adds its hidden states with a
weight to the anchor or to the direction of the target `W a + shape(W d)`; a rollout without contexts is not distilled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..rows.texts import Prompt

SHORTEN_CHOICES = ("middle", "end")

TEACHER_PROMPT_TEMPLATE = """{prompt}

A reference solution to this problem stands between the two marks.

=== Reference solution begins ===
{solution}
=== Reference solution ends ===

Work through it until every step is clear to you. Then solve the problem afresh, by your own reasoning and in your own words rather than by copying, and reach the same result. Put the final answer in \\boxed{}."""

REFERENCE_PROMPT_TEMPLATE = """A reference solution stands between the two marks.

=== Reference solution begins ===
{solution}
=== Reference solution ends ===

Work through it until every step is clear to you. Then give the solution afresh, by your own reasoning and in your own words rather than by copying, and reach the same result. Put the final answer in \\boxed{}."""


@dataclass(frozen=True)
class Rollout:
    """One sampled completion and what is known of it.

    Attributes:
        prompt: the dataset's prompt, text or a conversation that ends with a user turn.
        solution: the reference solution, or None where the row has none.
        completion: the sampled text.
        reward: its reward, or None if it has none.
        num_tokens: its length.
        finished: it ended by itself, not at the limit.
    """

    prompt: Prompt
    solution: str | None
    completion: str
    reward: float | None = None
    num_tokens: int = 0
    finished: bool = False


@dataclass(frozen=True)
class TeacherContext:
    """One view of the teacher on one rollout.

    Attributes:
        template: name of the prompt template: "teacher" (problem and slot), "reference" (slot only) or "plain"
            (the student's own prompt, nothing privileged).
        slot: the text put in place of `{solution}`; None for "plain".
        slot_tokens: budget of the slot's text alone, in tokens; None for no limit but the prompt's.
        anchor: weight of this view's hidden states in the anchor.
        direction: weight in the direction.
    """

    template: str
    slot: str | None
    slot_tokens: int | None = None
    anchor: float = 0.0
    direction: float = 0.0


Contexts = tuple[TeacherContext, ...]
ContextRule = Callable[[Sequence[Rollout], Any, Any], list[Contexts]]
