# SPDX-License-Identifier: Apache-2.0
"""Gates: how far a token, or a batch, is let act by how sure the teacher is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


def entropy_gate(
    target_entropy: torch.Tensor, largest: torch.Tensor | float, *, strength: float, floor: float = 0.1
) -> torch.Tensor:
    """clip(1 - gamma h, floor, 1) with h = H_p / max(1 nat, the largest H_p of the batch) (EGRSD, arXiv 2605.13255).

    Args:
        target_entropy: H_p, in nats.
        largest: of the whole batch, over all ranks.
        strength: gamma, >= 0.
        floor: of the gate, in [0, 1].
    """
    relative = target_entropy / torch.as_tensor(largest).clamp(min=1.0)
    return (1 - strength * relative).clamp(floor, 1.0)


def lookahead_minimum(values: torch.Tensor, mask: torch.Tensor, *, window: int) -> torch.Tensor:
    """Smallest valid value of the next `window` tokens and this one, (B, T), 0 outside the mask: CL-EGRSD gates by that of H.

    The window is cut where the rollout ends; the paper does not say.
    """
    valid = mask != 0
    padded = torch.nn.functional.pad(values.masked_fill(~valid, torch.inf), (0, window), value=torch.inf)
    return padded.unfold(-1, window + 1, 1).amin(-1).masked_fill(~valid, 0.0)


class LatchedGate(NamedTuple):
    """AntiSD's gate (arXiv 2605.11609): shut where the teacher grows surer than it was, open where it is not, else as before.

    Attributes:
        warmup: medians of the teacher's entropies over the first batches.
        gate: g, 0 or 1.
        ascends: what acts: g, but 0 in the first batches.
    """

    warmup: Sequence[float] = ()
    gate: float = 1.0
    ascends: float = 0.0

    def after(
        self, entropies: torch.Tensor, *, warmup_batches: int, closes_below: float, opens_at: float
    ) -> LatchedGate:
        """The gate for the loss of a batch.

        Args:
            entropies: (n,) of the teacher over the batch, of all ranks; their median is the lower of two.
            warmup_batches: first batches, whose mean the median is compared with.
            closes_below, opens_at: shares of that mean; g is 0 below the first, and 1 from the second on.
        """
        median, warmup = entropies.median().item(), [*self.warmup]
        if len(warmup) < warmup_batches:
            return LatchedGate([*warmup, median], self.gate, 0.0)
        gate = self.gate
        if any(warmup):
            share = median / (sum(warmup) / len(warmup))
            gate = 1.0 if share >= opens_at else 0.0 if share < closes_below else gate
        return LatchedGate(warmup, gate, gate)
