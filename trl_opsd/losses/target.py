# SPDX-License-Identifier: Apache-2.0
"""The target `W anchor + shape(W direction)` as one value, from the teacher's hidden states to a tile of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .head import OutputHead
from .projection import Projection
from .shapes import LinearShape, Shape


@dataclass(frozen=True)
class Target:
    """What the student is pulled to, as frozen hidden states and how they become logits.

    Attributes:
        anchor: (..., H) final hidden states of the view that the target starts from, or a weighted mean of views.
        direction: (..., H) weighted sum of views that moves it; None exactly where the shape reads no direction.
        shape: how the direction enters.
        head: frozen output head of the teacher; None takes the student's.

    Raises:
        ValueError: anchor and direction differ in shape, or a direction is given exactly where none is read.
    """

    anchor: torch.Tensor
    direction: torch.Tensor | None = None
    shape: Shape = field(default_factory=Shape)
    head: OutputHead | None = None

    def __post_init__(self):
        if self.shape.uses_direction != (self.direction is not None):
            raise ValueError(
                f"direction is {'None' if self.direction is None else 'given'}, but shape={self.shape} reads "
                f"{'one' if self.shape.uses_direction else 'none'}; pass a direction exactly where the shape reads it."
            )
        if self.direction is not None and self.direction.shape != self.anchor.shape:
            raise ValueError(
                f"direction has shape {tuple(self.direction.shape)} and anchor {tuple(self.anchor.shape)}; pass equal "
                "shapes (..., H)."
            )

    def at(self, positions: torch.Tensor) -> Target:
        """The target of the flattened `positions` (n,), detached."""
        chosen = (
            None if states is None else states.detach().flatten(0, -2)[positions]
            for states in (self.anchor, self.direction)
        )
        return replace(self, **dict(zip(("anchor", "direction"), chosen, strict=True)))

    def widened(self, count: int) -> Target:
        """The flattened target with `count` positions of zeros behind it, which are not to be read."""
        parts = (None if states is None else states.flatten(0, -2) for states in (self.anchor, self.direction))
        padded = (None if part is None else torch.nn.functional.pad(part, (0, 0, 0, count)) for part in parts)
        return replace(self, **dict(zip(("anchor", "direction"), padded, strict=True)))

    @property
    def folds(self) -> bool:
        """True where anchor and direction are one hidden state: W a + lambda W d = W (a + lambda d)."""
        return isinstance(self.shape, LinearShape)

    @property
    def num_tiles(self) -> int:
        """Tiles (n, V) that `write_logits` needs: the anchor, and a direction to be shaped."""
        return 1 + (self.shape.uses_direction and not self.folds)

    def write_logits(
        self, projection: Projection, rows: slice, tiles: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Anchor logits (n, V) and direction logits (n, V), or None where only the anchor counts.

        Args:
            projection: of the target's head.
            rows: the n positions of this tile.
            tiles: `num_tiles` tensors (n, V) to write into, float32 or float64.
        """
        anchor = self.anchor[rows]
        if self.folds:
            dtype = tiles[0].dtype
            anchor = anchor.to(dtype).add(self.direction[rows].to(dtype), alpha=self.shape.strength)
        anchor_logits = projection.write_logits(anchor, tiles[0])
        if self.num_tiles == 1:
            return anchor_logits, None
        return anchor_logits, projection.write_logits(self.direction[rows], tiles[1], with_bias=False)

    def shift_logits(self, anchor_logits: torch.Tensor, direction_logits: torch.Tensor | None) -> torch.Tensor:
        """The target's logits (n, V), written into `anchor_logits`; both as `write_logits` or a head gives them."""
        if direction_logits is None:
            return anchor_logits
        # An option, so that a callable that reads the direction alone is a shape.
        known = {"anchor_logits": anchor_logits} if getattr(self.shape, "reads_anchor", False) else {}
        return anchor_logits.add_(self.shape(direction_logits, **known))
