# SPDX-License-Identifier: Apache-2.0
"""Attempts that wait to be shown again, each with the row of its own question; the same on every rank."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .settings import CorrectionSettings


@dataclass(frozen=True)
class Attempt:
    """An answer of the model to a row's question.

    Attributes:
        row: of the dataset, as JSON; its prompt is the question.
        text: of the answer, as it is shown.
        is_right: whether it was rewarded.
        is_mixed: whether its group held right and wrong rollouts.
        batch: number of the generation batch that it was sampled in.
    """

    row: dict[str, Any]
    text: str
    is_right: bool
    is_mixed: bool
    batch: int


class CorrectionQueue:
    """Draws the attempts of each generation batch by the seed and the batch's number alone.

    Args:
        settings: reads `correction_share`, `right_attempt_share` and `max_attempt_age`.
        seed: of the run.
    """

    def __init__(self, settings: CorrectionSettings, seed: int):
        self.settings, self.seed = settings, seed
        self.batch, self.attempts = 0, list[Attempt]()

    def draw(self, num_groups: int) -> dict[int, Attempt]:
        """Begin a generation batch: which of its groups show which attempt; these leave the queue, and so do old ones."""
        self.batch += 1
        oldest = self.batch - self.settings.max_attempt_age
        self.attempts = [attempt for attempt in self.attempts if attempt.batch >= oldest]
        chance = random.Random(f"{self.seed}/corrections/{self.batch}")
        # The draw in place of rounding keeps the share over many batches that have few groups.
        count = int(self.settings.correction_share * num_groups + chance.random())
        groups = sorted(chance.sample(range(num_groups), count))
        drawn = {group: self._take(chance.random() < self.settings.right_attempt_share, chance) for group in groups}
        return {group: attempt for group, attempt in drawn.items() if attempt is not None}

    def _take(self, is_right: bool, chance: random.Random) -> Attempt | None:
        """An attempt of this kind, of a mixed group where there is one; None where none waits."""
        waiting = [attempt for attempt in self.attempts if attempt.is_right == is_right]
        mixed = [attempt for attempt in waiting if attempt.is_mixed]
        if not waiting:
            return None
        taken = chance.choice(mixed or waiting)
        self.attempts = [attempt for attempt in self.attempts if attempt is not taken]
        return taken

    def add(self, attempts: Sequence[Attempt]) -> None:
        """Let attempts of this generation batch wait."""
        self.attempts += attempts

    def state(self) -> dict[str, Any]:
        """Everything that the next draws depend on, as JSON."""
        return {"batch": self.batch, "attempts": [asdict(attempt) for attempt in self.attempts]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.batch = state["batch"]
        self.attempts = [Attempt(**attempt) for attempt in state["attempts"]]
