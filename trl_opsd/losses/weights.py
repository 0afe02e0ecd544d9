# SPDX-License-Identifier: Apache-2.0
"""From one divergence per position to a loss: weights whose denominator is a global count."""

from __future__ import annotations

import torch

REDUCTIONS = ("token", "sequence")


def token_weights(
    mask: torch.Tensor, *, reduction: str = "token", denominator: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Weight of every position, so that the loss is `weighted_sum(divergence, weights)`.

    Args:
        mask: (B, T) bool or number, nonzero where a position counts.
        reduction: `token` weighs all valid positions alike; `sequence` weighs all sequences alike, a sequence
            with no valid position being left out.
        denominator: what the sum is divided by, > 0, as float or 0-d tensor: for `token` the valid
            positions, for `sequence` the sequences of the whole optimizer step, over all ranks and
            accumulation steps.

    Returns:
        (B, T) float32, exactly 0 where the mask is 0.

    Raises:
        ValueError: for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; set one of {REDUCTIONS}.")
    weights = (mask != 0).float()
    if reduction == "sequence":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return weights / denominator


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scalar sum of `values` times `weights`, both (...); weight 0 counts 0 whatever the value is."""
    return (values.masked_fill(weights == 0, 0.0) * weights).sum()
