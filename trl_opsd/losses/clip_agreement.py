# SPDX-License-Identifier: Apache-2.0
"""How far the clip leaves the gradient's direction: the cosine of the clipped and the unclipped gradient.

A per-entry clip cuts the terms that the target most wants raised, and with them their gradient. Where that was most of
the gradient, the rest may point the other way: then training on the clipped loss raises the divergence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .divergences import Divergence
from .fused import fused_divergence
from .head import OutputHead
from .target import Target


def clip_gradient_products(
    student_hidden: torch.Tensor, head: OutputHead, target: Target, *, divergence: Divergence, **settings: Any
) -> torch.Tensor:
    """Inner products of the gradients of the clipped and the unclipped loss with respect to the student's hidden states.

    Products of parts of a batch add up to those of the batch. Costs two losses, and no gradient of the head.

    Args:
        student_hidden, head, target, divergence: as in [`fused_divergence`].
        **settings: its other arguments.

    Returns:
        (3,) float64: clipped with unclipped, clipped with itself, unclipped with itself.

    Raises:
        ValueError: as [`fused_divergence`].
    """
    hidden = student_hidden.detach().requires_grad_()
    with torch.enable_grad():
        losses = [
            fused_divergence(hidden, head.frozen(), target, divergence=rule, **settings)[0]
            for rule in (divergence, replace(divergence, clip=None))
        ]
        clipped, unclipped = (torch.autograd.grad(loss, hidden)[0] for loss in losses)
    pairs = (clipped, unclipped), (clipped, clipped), (unclipped, unclipped)
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs])


def clip_agreement(products: torch.Tensor) -> float | None:
    """Cosine of the two gradients from summed products (3,), in [-1, 1]: 0 where everything is cut, None where nothing was to be learned."""
    product, clipped, unclipped = products.tolist()
    if unclipped == 0:
        return None
    return product / (clipped * unclipped) ** 0.5 if clipped > 0 else 0.0
