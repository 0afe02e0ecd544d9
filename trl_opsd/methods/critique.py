# SPDX-License-Identifier: Apache-2.0
"""Step-aligned critique: the teacher reads a critique of the very rollout that it scores (arXiv 2606.11173).

    loss = mean over tokens of KL(teacher || student), the teacher reads question and critique

A critique follows the rollout step by step: it repeats what is sound and departs from it at the first fault, so teacher and
student differ where the rollout fails and hardly elsewhere. A reference solution makes them differ at every token.

A critique comes from a function of the user's (`critique_function`), from the column `critique`, or from the model itself
(`write_critique`). A rollout whose critique fails or is empty is left out and counted. Where the critique is the row's
solution in OPSD's template, this is OPSD.

Differences to the paper, which we know through notes: its critic is a frozen QwQ-32B, which stands here behind
`critique_function`; the model as its own critic is ours. Which copy of the weights the teacher has is not said there: ours are
the initial ones.
"""

from collections.abc import Sequence
from typing import Any

from ..rows.texts import is_missing
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from ..user_functions import said_of
from .base import Method
from .groups import is_right
from .papers import arxiv_paper

VERDICTS = {True: "right", False: "wrong", None: "neither known to be right nor to be wrong"}


def critiques(rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[Any]:
    """Of each rollout what the user's critic or the column says, the error that the critic raised, or None."""
    return said_of(
        rollouts,
        settings,
        column="critique",
        function="critique_function",
        failing="are counted in the log and not distilled",
    )


def critic_request(rollout: Rollout, settings: Any) -> TeacherContext | None:
    """What the model answers as its own critic; None where it is not, or where nothing was attempted."""
    if not settings.write_critique or is_missing(rollout.completion):
        return None
    right = is_right(rollout, settings.reward_threshold)
    verdict = VERDICTS[right] + ("" if rollout.finished else ", and it was cut off")
    return TeacherContext("critic", rollout.solution, texts=(("attempt", rollout.completion), ("verdict", verdict)))


def critique_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads question and critique; its view is the target."""
    return [_context(rollout) for rollout in group]


def _context(rollout: Rollout) -> Contexts:
    text = rollout.written.text if rollout.written is not None else rollout.note
    if isinstance(text, Exception):
        return Unused("critique failed")
    if not isinstance(text, str) or is_missing(text):
        return Unused("no critique")
    return (TeacherContext("teacher", text, anchor=1.0),)


CRITIQUE = Method(
    name="CritiqueSD",
    contexts=critique_contexts,
    needs_solution=False,
    notes=critiques,
    asks=critic_request,
    templates=lambda settings: {"critic": settings.critic_prompt_template} if settings.write_critique else {},
    columns=("critique",),
    needs_columns=lambda settings: () if settings.critique_function or settings.write_critique else ("critique",),
    paper=arxiv_paper("The Role of Feedback Alignment in Self-Distillation", "2606.11173", "critique2026"),
)
