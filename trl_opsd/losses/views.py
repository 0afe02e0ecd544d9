# SPDX-License-Identifier: Apache-2.0
"""The target `anchor + shape(direction)` from hidden states, a tile of positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .divergences import compute_dtype
from .projection import Projection
from .targets import LinearShape, Shape

WeightedViews = Sequence[tuple[float | torch.Tensor, torch.Tensor]]
Direction = torch.Tensor | WeightedViews | None


@dataclass(frozen=True)
class TargetViews:
    """Frozen hidden states and how they become a target.

    Attributes:
        projection: the frozen output head.
        anchor: (N, H).
        direction: (N, H) for a linear head, signed views for a capped one, None where the shape reads none.
        shape: how the direction enters.
    """

    projection: Projection
    anchor: torch.Tensor
    direction: Direction
    shape: Shape

    @property
    def folds(self) -> bool:
        """True where anchor and direction are one hidden state: W a + lambda W d = W (a + lambda d)."""
        return self.projection.softcap is None and isinstance(self.shape, LinearShape)

    @property
    def num_tiles(self) -> int:
        """Tiles (n, V) that `write` needs: the anchor, a direction to be shaped, and a view to be capped."""
        if not self.shape.uses_direction or self.folds:
            return 1
        return 2 if self.projection.softcap is None else 3

    def write(self, rows: slice, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Anchor logits (n, V) and direction logits (n, V), or None where only the anchor counts.

        Args:
            rows: the n positions of this tile.
            tiles: `num_tiles` tensors (n, V) to write into, float32 or float64.
        """
        anchor = self.anchor[rows]
        if self.folds:
            dtype = tiles[0].dtype
            anchor = torch.add(anchor.to(dtype), self.direction[rows].to(dtype), alpha=self.shape.strength)
        anchor_logits = self.projection.write_logits(anchor, tiles[0])
        if self.folds or not self.shape.uses_direction:
            return anchor_logits, None
        if self.projection.softcap is None:
            return anchor_logits, self.projection.write_logits(self.direction[rows], tiles[1], with_bias=False)
        return anchor_logits, self._capped_direction(rows, tiles[1].zero_(), tiles[2])

    def _capped_direction(self, rows: slice, total: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        for weight, hidden in self.direction:
            self.projection.write_logits(hidden[rows], view)
            total.add_(view.mul_(weight[rows].unsqueeze(-1) if torch.is_tensor(weight) else weight))
        return total


def select_direction(direction: Direction, positions: torch.Tensor, *, linear_head: bool) -> Direction:
    """The direction at `positions`, signed views being summed to one hidden state where the head is linear.

    Raises:
        ValueError: for a single tensor with a capped head, whose views must be capped one by one.
    """
    if direction is None:
        return None
    if torch.is_tensor(direction):
        if not linear_head:
            raise ValueError(
                "direction_hidden is one tensor, but with a logit_softcap the head is not linear; pass the "
                "views it was made of as pairs (weight, hidden)."
            )
        return direction.detach()[positions]
    views = [
        (weight[positions] if torch.is_tensor(weight) else weight, hidden.detach()[positions])
        for weight, hidden in direction
    ]
    return sum_views(views) if linear_head else views


def sum_views(views: WeightedViews) -> torch.Tensor:
    """Weighted sum (N, H) of the views, in float32 or float64; each weight a float or (N,)."""
    total = 0.0
    for weight, hidden in views:
        weight = weight.unsqueeze(-1) if torch.is_tensor(weight) else weight
        total = total + hidden.to(compute_dtype(hidden.dtype)) * weight
    return total
