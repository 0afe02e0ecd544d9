# SPDX-License-Identifier: Apache-2.0
"""What a teacher reads: from a group of rollouts to prompt templates, what stands in their slot, and weights.

A method names, for every rollout, the views that its teacher has of it. A view adds its hidden states with a weight to
the anchor or to the direction of the target `W a + shape(W d)`, or it is read: then it stands apart from the others, and
what is kept of it are two numbers a token. A rollout without a view is not trained on.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..rows.solution_steps import first_steps
from ..rows.texts import Prompt

TEACHER_KINDS = ("base", "live", "ema")  # whose weights a teacher has

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


def reference_template(teacher_template: str) -> str:
    """The teacher's template without the problem, for the diagnosis of a method that has no such view of its own."""
    if teacher_template == TEACHER_PROMPT_TEMPLATE:
        return REFERENCE_PROMPT_TEMPLATE
    return teacher_template.replace("{prompt}", "").strip()


def all_templates(settings: Any, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Prompt templates by the name that contexts use: those of every method, and a method's `own`, which win."""
    teacher = settings.teacher_template
    return {"teacher": teacher, "reference": reference_template(teacher), **(own or {})}


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
        columns: the values of the dataset's columns that `Method.columns` names.
        written: what was written for it before scoring (see `Method.asks`), or None.
        drafts: further texts that were written for it, in their order (see `Method.drafts`).
        token_ends: of each of its tokens, the place in `completion` where its text ends; empty unless the method has marks.
        note: what `Method.notes` said of it, or None.
        solution_share: share of the solution's steps that the teacher is shown, above 0 and at most 1.
        teacher_prompt: what the teacher reads in place of the template `teacher`, text or a conversation; None for the template.
        turns: with tools the messages of the rollout, the model's with its calls and the tools'; empty without.
    """

    prompt: Prompt
    solution: str | None
    completion: str
    reward: float | None = None
    num_tokens: int = 0
    finished: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)
    written: "Written | None" = None
    drafts: "tuple[Draft, ...]" = ()
    token_ends: tuple[int, ...] = ()
    note: Any = None
    solution_share: float = 1.0
    teacher_prompt: Prompt | None = None
    turns: tuple[Mapping[str, Any], ...] = ()

    @property
    def shown_solution(self) -> str | None:
        """What of the solution the teacher is shown: its first steps, by `solution_share`."""
        return first_steps(self.solution, self.solution_share)


@dataclass(frozen=True)
class Written:
    """A text that was written before scoring.

    Attributes:
        text: without control tokens.
        ids: its tokens as they were sampled.
    """

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Draft(Written):
    """One of several texts that were written for a rollout.

    Attributes:
        reward: what the reward functions say of it as an answer to the rollout's prompt; None where they say nothing or are not
            asked.
        overlap: share of its tokens that are among the student's likeliest at the same place of the rollout, in [0, 1].
    """

    reward: float | None = None
    overlap: float = 0.0


@dataclass(frozen=True)
class Moment:
    """When a method is asked, and what it remembers.

    Attributes:
        draw: random numbers, the same on every rank.
        step: optimizer steps so far.
        memory: what `Method.remember` returned last; empty at first.
    """

    draw: random.Random
    step: int = 0
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherContext:
    """One view of the teacher on one rollout.

    Attributes:
        template: name of the prompt template: "teacher" (problem and slot), "reference" (slot only), "plain"
            (the student's own prompt, nothing privileged), or one of `Method.templates`.
        slot: the text put in place of `{solution}`; None for "plain".
        slot_tokens: budget of the slot's text alone, in tokens; None for no limit but the prompt's.
        anchor: weight of this view's hidden states in the anchor.
        direction: weight in the direction.
        read: None, or the weight of a view that stands apart: the sampled token's log-probability and the entropy under
            it are kept, and the weight beside them.
        weights: whose weights read it: "teacher", "base" (the initial ones) or "live" (the student's).
        texts: name and text of the template's further slots; they are never shortened. None stands for an empty column, whose
            line is left out.
        opening: text that opens the teacher's turn, behind `teacher_prefix` and before the rollout.
        own_prompt: what the row brings in place of the template, as JSON of a text or of messages; empty for the template.
    """

    template: str
    slot: str | None
    slot_tokens: int | None = None
    anchor: float = 0.0
    direction: float = 0.0
    read: float | None = None
    weights: str = "teacher"
    texts: tuple[tuple[str, str | None], ...] = ()
    opening: str = ""
    own_prompt: str = ""


class Unused(tuple):
    """No view, and why: empty contexts of a rollout that is not trained on.

    Args:
        reason: a few words in the singular, such as "no right peer"; the log counts the rollouts of each.
        planned: that it is so is no fault of data or settings, and nothing to warn of.
    """

    reason: str
    planned: bool

    def __new__(cls, reason: str, *, planned: bool = False):
        """Empty contexts with a reason."""
        unused = super().__new__(cls)
        unused.reason, unused.planned = reason, planned
        return unused


class Counted(tuple):
    """Contexts of a rollout that is used, and what of it the log counts all the same.

    Attributes:
        reason: a few words, such as "no rubric".
    """

    reason: str

    def __new__(cls, contexts: Sequence[TeacherContext], reason: str):
        """The contexts with a reason."""
        counted = super().__new__(cls, contexts)
        counted.reason = reason
        return counted


Contexts = tuple[TeacherContext, ...]
ContextRule = Callable[[Sequence[Rollout], Any, Moment], list[Contexts]]


def views_text(contexts: Contexts) -> str:
    """What reads a rollout, in a few words: its templates, a number before one that is read several times, or why none does."""
    counts = Counter(context.template for context in contexts)
    told = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
    return told or getattr(contexts, "reason", "")
