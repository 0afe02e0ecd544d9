# SPDX-License-Identifier: Apache-2.0
"""The output head as a product in both directions: hidden states to tempered logits, and gradients back.

Products take narrow inputs where the device accumulates them in float32 (CUDA); elsewhere the head is
widened a slice at a time, so that no second copy of it exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .divergences import compute_dtype
from .head import OutputHead

# Head rows widened, or added to, at a time: 8192 x 4096 in float32 is 128 MiB.
WIDENED_ROWS = 8192

# In the place of a bias below it, of -inf too: the token's probability is exactly 0, and its products with 0 are finite.
LOWEST_BIAS = -1e30


@dataclass(frozen=True)
class Projection:
    """A frozen head at a temperature: logits `softcap(logit_scale * (W h + b)) / temperature`.

    Attributes:
        head: the output head, detached; its bias is finite.
        temperature: divisor of the logits, > 0.
        dtype: in which products take their inputs, see `product_dtype`.
    """

    head: OutputHead
    temperature: float
    dtype: torch.dtype

    @classmethod
    def of(cls, head: OutputHead, temperature: float, dtype: torch.dtype) -> Projection:
        """A projection detached from the head; on CUDA the head is narrowed to the products' dtype once.

        A bias of -inf, which gives a token no probability, becomes `LOWEST_BIAS`.
        """
        head = head.frozen()
        if head.weight.is_cuda:
            head = replace(head, weight=head.weight.to(dtype))
        if head.bias is not None:
            bias = head.bias.to(torch.promote_types(head.bias.dtype, torch.float32))
            head = replace(head, bias=bias.clamp(min=LOWEST_BIAS))
        return cls(head, temperature, dtype)

    @property
    def num_tokens(self) -> int:
        """V, the rows of the head."""
        return len(self.head.weight)

    @property
    def factor(self) -> float:
        """d logits / d (W h + b), for a softcap at z = 0."""
        return self.head.logit_scale / self.temperature

    def write_logits(self, hidden: torch.Tensor, out: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Fill `out` (n, V), float32 or float64, with tempered logits of `hidden` (n, H); returns `out`."""
        hidden = hidden.to(self.dtype)
        for rows, weight in self._slices():
            _product(hidden, weight.t(), out[:, rows])
        if with_bias and self.head.bias is not None:
            out.add_(self.head.bias)
        softcap = self.head.logit_softcap
        if softcap is not None:
            out.mul_(self.head.logit_scale / softcap).tanh_().mul_(softcap / self.temperature)
        elif self.factor != 1:
            out.mul_(self.factor)
        return out

    def through_softcap(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`gradient` (n, V) in place times the softcap's derivative at the tempered `logits` (n, V)."""
        if self.head.logit_softcap is None:
            return gradient
        tanh = logits * (self.temperature / self.head.logit_softcap)
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
        weight = self.head.weight
        step = WIDENED_ROWS if weight.dtype != self.dtype else len(weight)
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            yield rows, weight[rows].to(self.dtype)


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
