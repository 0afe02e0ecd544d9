# SPDX-License-Identifier: Apache-2.0
"""Settings of the methods whose authors choose how often the teacher's moving average is updated."""

from dataclasses import dataclass

from .fields import option, require, teacher_kind


@dataclass
class MovingTeacherSettings:
    """A teacher that follows the student; the other methods update theirs after every optimizer step, if it moves."""

    teacher_model_kind: str = teacher_kind("ema")
    teacher_sync_steps: int | None = option(
        None, "Optimizer steps between two updates of the `ema` teacher; None for one update a generation batch."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        interval = self.teacher_sync_steps
        require(interval is None or interval >= 1, self, "teacher_sync_steps", "1 or more, or None")
