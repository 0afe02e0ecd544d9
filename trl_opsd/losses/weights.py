# SPDX-License-Identifier: Apache-2.0
"""From one divergence per position to a loss: weights whose denominator is a global count."""

from __future__ import annotations

import torch

REDUCTIONS = ("token", "sequence")


def token_weights(
    mask: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    reduction: str = "token",
    denominator: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Weight of every position, so that the loss is `weighted_sum(divergence, weights)`.

    Args:
        mask: (B, T) bool or number, nonzero where a position counts; its value is not read.
        weights: (B, T) or (B, 1) factor of each position, of any sign, or None for 1. It does not change what is divided by.
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
    counted = (mask != 0).float()
    shares = counted / counted.sum(-1, keepdim=True).clamp(min=1) if reduction == "sequence" else counted
    if weights is not None:
        shares = torch.where(mask != 0, shares * weights.detach(), 0.0).float()  # whatever a weight is outside the mask
    return shares / denominator


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scalar sum of `values` times `weights`, both (...); weight 0 counts 0 whatever the value is."""
    return (values.masked_fill(weights == 0, 0.0) * weights).sum()
