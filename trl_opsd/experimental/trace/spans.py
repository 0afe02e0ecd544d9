# SPDX-License-Identifier: Apache-2.0
"""The spans of TRACE: who marks them in a rollout, for how long they are asked for, and what they say of its tokens."""

from collections.abc import Sequence
from typing import Any

from ...losses import held_then_falling
from ...rows.spans import read_spans, token_marks
from ...teacher.contexts import Moment, Rollout
from ...user_functions import said_of


def strength(settings: Any, step: int) -> float:
    """lambda / w_0 after `step` optimizer steps, in [0, 1]."""
    return held_then_falling(step, largest=1.0, hold=settings.span_hold_steps, fall=settings.span_fall_steps)


def annotations(rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[Any]:
    """Of each rollout its spans, an error where they cannot be read, or None where nobody is asked any more."""
    if not strength(settings, moment.step):
        return [None] * len(rollouts)
    found = said_of(
        rollouts,
        settings,
        column="spans",
        function="annotator_function",
        failing="are counted in the log and not distilled",
    )
    return [read_spans(spans, len(rollout.completion)) for spans, rollout in zip(found, rollouts, strict=True)]


def span_marks(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[list[float]]:
    """Of each token 1 in a key span, -1 in an error span, 0 elsewhere; a token that a span touches belongs to it."""
    return [marks_of(rollout) for rollout in group]


def marks_of(rollout: Rollout) -> list[float]:
    """The marks of one rollout, whose note are its spans."""
    return token_marks(rollout.note if isinstance(rollout.note, tuple) else (), rollout.token_ends)
