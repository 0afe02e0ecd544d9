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
Views = torch.Tensor | WeightedViews


@dataclass(frozen=True)
class TargetViews:
    """Frozen hidden states and how they become a target.

    Attributes:
        projection: the frozen output head.
        anchor: (N, H), or under a capped head weighted views.
        direction: (N, H) for a linear head, signed views for a capped one, None where the shape reads none.
        shape: how the direction enters.
    """

    projection: Projection
    anchor: Views
    direction: Views | None
    shape: Shape

    @property
    def folds(self) -> bool:
        """True where anchor and direction are one hidden state: W a + lambda W d = W (a + lambda d)."""
        return self.projection.softcap is None and isinstance(self.shape, LinearShape)

    @property
    def num_tiles(self) -> int:
        """Tiles (n, V) that `write` needs: the anchor, a direction to be shaped, and a view to be capped."""
        shaped = self.shape.uses_direction and not self.folds
        return 1 + shaped + any(isinstance(views, list) for views in (self.anchor, self.direction))

    def write(self, rows: slice, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Anchor logits (n, V) and direction logits (n, V), or None where only the anchor counts.

        Args:
            rows: the n positions of this tile.
            tiles: `num_tiles` tensors (n, V) to write into, float32 or float64.
        """
        if self.folds:
            dtype = tiles[0].dtype
            anchor, direction = self.anchor[rows].to(dtype), self.direction[rows].to(dtype)
            return self.projection.write_logits(anchor.add(direction, alpha=self.shape.strength), tiles[0]), None
        anchor_logits = self._write(self.anchor, rows, tiles[0], tiles[-1])
        if not self.shape.uses_direction:
            return anchor_logits, None
        if torch.is_tensor(self.direction):
            return anchor_logits, self.projection.write_logits(self.direction[rows], tiles[1], with_bias=False)
        return anchor_logits, self._write(self.direction, rows, tiles[1], tiles[-1])

    def _write(self, views: Views, rows: slice, total: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """Logits of the views, each capped and then added up in `total` (n, V)."""
        if torch.is_tensor(views):
            return self.projection.write_logits(views[rows], total)
        total.zero_()
        for weight, hidden in views:
            if not torch.is_tensor(weight):
                total.add_(self.projection.write_logits(hidden[rows], view), alpha=weight)
            elif weight[rows].any():  # rows have unequal numbers of views: a projection costs more than the question
                logits = self.projection.write_logits(hidden[rows], view)
                total.addcmul_(logits, weight[rows].unsqueeze(-1).to(total.dtype))
        return total


def select_views(views: Views | None, positions: torch.Tensor, *, linear_head: bool) -> Views | None:
    """Anchor or direction at `positions`; weighted views are summed to one hidden state where the head is linear."""
    if views is None:
        return None
    if torch.is_tensor(views):
        return views.detach()[positions]
    chosen = [
        (weight[positions] if torch.is_tensor(weight) else weight, hidden.detach()[positions])
        for weight, hidden in views
    ]
    return sum_views(chosen) if linear_head else chosen


def sum_views(views: WeightedViews) -> torch.Tensor:
    """Weighted sum (N, H) of the views, in float32 or float64; each weight a float or (N,)."""
    total = 0.0
    for weight, hidden in views:
        weight = weight.unsqueeze(-1) if torch.is_tensor(weight) else weight
        total = total + hidden.to(compute_dtype(hidden.dtype)) * weight
    return total
