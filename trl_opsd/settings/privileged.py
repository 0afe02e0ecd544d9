# SPDX-License-Identifier: Apache-2.0
"""Settings of what rows bring for the teacher to read: prompts of their own, and parts of their solutions."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from .fields import option

SOLUTION_CONTROLS = ("shuffled", "empty", "shortest_rollout")
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_MOVING = re.compile(rf"\s*{_NUMBER}\s*\.\.\s*{_NUMBER}\s+in\s+(\d+)\s*")


class Share(NamedTuple):
    """A share that moves linearly.

    Attributes:
        start: at the first step.
        end: after `steps` optimizer steps, and from then on.
        steps: that the change takes.
    """

    start: float
    end: float
    steps: int

    def at(self, step: int | None) -> float:
        """The share after `step` optimizer steps; None for the last."""
        if step is None or step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


def read_share(value: float | str) -> Share:
    """A share of a solution: a number, or text as "1.0..0.2 in 50"; a number does not move.

    Raises:
        ValueError: a share is not above 0 and at most 1, or nothing moves; says what to write.
    """
    moving = _MOVING.fullmatch(value) if isinstance(value, str) else None
    try:
        start, end, steps = moving.groups() if moving else (value, value, 1)
        share = Share(float(start), float(end), int(steps))
    except (TypeError, ValueError):
        share = Share(0.0, 0.0, 0)
    valid = all(0 < part <= 1 for part in share[:2]) and share.steps > 0 and not isinstance(value, bool)
    if valid and not (moving and share.start == share.end):
        return share
    raise ValueError(
        f"shown_solution={value!r} is not valid; set it to a number above 0 and at most 1, to a moving one as '1.0..0.2 in 50' (the "
        "whole solution at the first step, linearly less down to a fifth of its steps after 50 optimizer steps), or to one of "
        f"{SOLUTION_CONTROLS}."
    )


@dataclass
class PrivilegedTextSettings:
    """What the teacher reads by row, beside what a method shows it. The columns that a template names need no setting."""

    shown_solution: float | str | None = option(
        1.0,
        "What of the solution the teacher is shown: a share of its steps (lines, or the sentences of a single line), where `1.0..0.2 in "
        "50` moves from all of them to a fifth over 50 optimizer steps. Or a control in its place: `shuffled` another problem's, "
        "`empty` nothing, `shortest_rollout` the shortest other right rollout of the prompt. Answers are verified with the row's own.",
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        if self.solution_control is None:
            share = read_share(1.0 if self.shown_solution is None else self.shown_solution)
            self.shown_solution = share.start if share.start == share.end else self.shown_solution

    @property
    def solution_control(self) -> str | None:
        """Which of `SOLUTION_CONTROLS` stands in the solution's place; None where the row's own is shown."""
        return self.shown_solution if self.shown_solution in SOLUTION_CONTROLS else None

    @property
    def solution_share(self) -> float | str:
        """The share of the steps that is shown of what stands in the solution's place."""
        return 1.0 if self.solution_control is not None else self.shown_solution

    def solution_share_at(self, step: int | None) -> float:
        """The share after `step` optimizer steps, None for what the run ends with."""
        return read_share(self.solution_share).at(step)
