# SPDX-License-Identifier: Apache-2.0
"""The output head as a product in both directions: hidden states to tempered logits, and gradients back.

Products take narrow inputs where the device accumulates them in float32 (CUDA); elsewhere the head is
widened a slice at a time, so that no second copy of it exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .divergences import compute_dtype

# Head rows widened, or added to, at a time: 8192 x 4096 in float32 is 128 MiB.
WIDENED_ROWS = 8192

# In the place of a bias below it, of -inf too: the token's probability is exactly 0, and its products with 0 are finite.
LOWEST_BIAS = -1e30


@dataclass(frozen=True)
class Projection:
    """Logits `softcap(logit_scale * (W h + b)) / temperature`, with everything constant.

    Attributes:
        weight: (V, H) W.
        bias: (V,) b, finite, or None.
        logit_scale: multiplier of the logits.
        softcap: cap of `cap * tanh(z / cap)`, or None for a linear head.
        temperature: divisor of the logits, > 0.
        dtype: in which products take their inputs, see `product_dtype`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, **settings) -> Projection:
        """A projection detached from the head; on CUDA the head is narrowed to the products' dtype once.

        A bias of -inf, which gives a token no probability, becomes `LOWEST_BIAS`.
        """
        weight = weight.detach().to(settings["dtype"]) if weight.is_cuda else weight.detach()
        if bias is not None:
            bias = bias.detach().to(torch.promote_types(bias.dtype, torch.float32)).clamp(min=LOWEST_BIAS)
        return cls(weight, bias, **settings)

    @property
    def factor(self) -> float:
        """d logits / d (W h + b), for a softcap at z = 0."""
        return self.logit_scale / self.temperature

    def write_logits(self, hidden: torch.Tensor, out: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Fill `out` (n, V), float32 or float64, with tempered logits of `hidden` (n, H); returns `out`."""
        hidden = hidden.to(self.dtype)
        for rows, weight in self._slices():
            _product(hidden, weight.t(), out[:, rows])
        if with_bias and self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.factor != 1:
            out.mul_(self.factor)
        return out

    def through_softcap(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`gradient` (n, V) in place times the softcap's derivative at the tempered `logits` (n, V)."""
        if self.softcap is None:
            return gradient
        tanh = logits * (self.temperature / self.softcap)
        return gradient.mul_(tanh.mul_(tanh).neg_().add_(1))

    def write_gradients(
        self,
        gradient: torch.Tensor,
        weights: torch.Tensor,
        hidden: torch.Tensor,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
        grad_bias: torch.Tensor | None,
        *,
        first: bool,
    ) -> None:
        """Write the gradients that are given, all float32 or float64.

        Args:
            gradient: (n, V) derivative of each position's loss, passed through the softcap.
            weights: (n,) weight of each position.
            hidden: (n, H) hidden states.
            grad_hidden: (n, H), overwritten.
            grad_weight: (V, H), added to; the `first` time overwritten.
            grad_bias: (V,), likewise.
            first: nothing was added yet, and what is there means nothing.
        """
        weights = weights * self.factor
        narrow = gradient.to(self.dtype)
        if grad_hidden is not None:
            for rows, weight in self._slices():
                _add_product(grad_hidden, narrow[:, rows], weight, first=rows.start == 0)
            grad_hidden.mul_(weights.unsqueeze(-1))
        if grad_weight is not None:
            weighted = (hidden.to(weights.dtype) * weights.unsqueeze(-1)).to(self.dtype)
            _add_product(grad_weight, narrow.t(), weighted, first=first)
        if grad_bias is not None:
            grad_bias.addmv_(gradient.t(), weights, beta=0 if first else 1)

    def _slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the head in the dtype of the products, with the rows they hold."""
        step = WIDENED_ROWS if self.weight.dtype != self.dtype else len(self.weight)
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            yield rows, self.weight[rows].to(self.dtype)


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype of the inputs of products with `hidden`; results are float32, or float64 for float64."""
    device = hidden.device.type
    if device != "cuda" or hidden.dtype == torch.float64 or "dtype_out" not in torch.ops.aten.mm.overloads():
        return compute_dtype(hidden.dtype)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """Add `a @ b` to `total`, or overwrite it; no other tensor is as large as a head."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        _product(a, b, total)
    else:
        for start in range(0, len(total), WIDENED_ROWS):
            rows = slice(start, start + WIDENED_ROWS)
            total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))
