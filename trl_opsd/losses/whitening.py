# SPDX-License-Identifier: Apache-2.0
"""Mean and deviation of all numbers seen so far, for rewards that no group of rollouts puts to scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class RunningMoments(NamedTuple):
    """Welford's running moments; three plain numbers, so that they can be saved.

    Attributes:
        count: numbers seen.
        mean: of them.
        squares: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_values(self, values: Iterable[float]) -> RunningMoments:
        """The moments after further numbers, one after the other."""
        count, mean, squares = self
        for value in values:
            count += 1
            distance = value - mean
            mean += distance / count
            squares += distance * (value - mean)
        return RunningMoments(count, mean, squares)

    @property
    def deviation(self) -> float:
        """Root of the mean squared distance, 0 without numbers."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def whitened(self, values: torch.Tensor) -> torch.Tensor:
        """Distances from the mean in deviations, any shape; 0 where all numbers so far are equal."""
        deviation = self.deviation
        return (values - self.mean) / deviation if deviation else torch.zeros_like(values)
