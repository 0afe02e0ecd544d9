# SPDX-License-Identifier: Apache-2.0
"""The output head as one value, from the model to a tile of logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class OutputHead:
    """The map from hidden states to logits: `softcap(logit_scale * (h @ weight.T + bias))`.

    Attributes:
        weight: (V, H), whole (gathered) where it is used; a DTensor is gathered once a loss.
        bias: (V,) or None.
        logit_scale: multiplier of the logits, 1 for most models (Cohere and Granite have others).
        logit_softcap: cap of `cap * tanh(z / cap)` (Gemma 2), > 0, or None for a linear head.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Dense logits (..., V) of hidden states (..., H): for checks and small models."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias) * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    def first_rows(self, count: int) -> OutputHead:
        """The head of the first `count` tokens, gathered if it is sharded."""
        return replace(self, weight=_first_rows(self.weight, count), bias=_first_rows(self.bias, count))

    def frozen(self) -> OutputHead:
        """The same values without a gradient."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def _first_rows(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor if len(tensor) == count else tensor[:count]
