# SPDX-License-Identifier: Apache-2.0
"""The machine under the fused losses: tiles of logits, swept once for value, diagnostics and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .closed_form import Row, finished, num_rows, sweep, sweep_sampled
from .divergences import Divergence
from .facts import Facts, columns_at
from .projection import Projection
from .target import Target
from .weights import weighted_sum

# Bytes of one tile, and of the part of it that the elementwise work handles at a time. On a CPU 1 MiB is
# fastest on one idle core; 8 MiB costs a few percent there and makes far fewer thread barriers, which are
# slow on a busy machine.
TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
# Below some 256 rows the products are slower: by 10 % at 128, by 30 % at 64 (docs/log.md).
MIN_TILE_TOKENS = 256


def nonzero_positions(mask: torch.Tensor) -> torch.Tensor:
    """(n,) places of a flattened mask that are not 0; waits for the device."""
    return mask.flatten().nonzero().squeeze(-1)


@dataclass(frozen=True)
class Work:
    """All that is constant in the loss of n positions, those whose weight is not 0.

    Attributes:
        student: the student's head, as its hidden states are projected with it.
        teacher: the target's head, likewise.
        target: of the n positions; None in a loss of the sampled tokens alone.
        divergence: its temperature is in the projections.
        weights: (n,) float32 or float64.
        token_ids: (n,) sampled tokens, or None.
        given: columns of the caller's for [`Facts`].
        tile_tokens, compiled, weight_of: as in [`fused_divergence`].
    """

    student: Projection
    teacher: Projection
    target: Target | None
    divergence: Divergence
    weights: torch.Tensor
    token_ids: torch.Tensor | None
    given: Mapping[str, torch.Tensor]
    tile_tokens: int | None
    compiled: bool | str
    weight_of: Callable[[Facts], torch.Tensor] | None = None

    def run(self, hidden: torch.Tensor, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and diagnostics (8, n) of hidden states (n, H); writes the gradients."""
        judge = partial(self.judge, with_gradient=gradients.wanted)
        stats, factors = [self.empty_stats()], [self.weights.new_zeros(0)]
        for tile in self.tiles(hidden):
            stats.append(self.sweep_tile(tile, judge))
            factors.append(self.factor(stats[-1], tile.rows))
            if gradients.wanted:
                self.write_gradients(tile, self.weights[tile.rows] * factors[-1], hidden, gradients)
        factor = torch.cat(factors)
        diagnostics = finished(torch.cat(stats, dim=1), factor)
        return weighted_sum(diagnostics[Row.CLIPPED], self.weights * factor), diagnostics

    def factor(self, stats: torch.Tensor, rows: slice) -> torch.Tensor:
        """What `weight_of` makes of the facts of a tile, (n,); 1 without it."""
        if self.weight_of is None:
            return torch.ones_like(stats[0])
        factor = self.weight_of(Facts.of(stats, columns_at(self.given, rows))).detach()
        if factor.shape != stats[0].shape:
            raise ValueError(f"weight_of gave shape {tuple(factor.shape)} for facts {tuple(stats[0].shape)}; give one.")
        return factor.to(stats.dtype)

    def empty_stats(self) -> torch.Tensor:
        """What a sweep returns of no position."""
        samples = self.token_ids is not None
        return self.weights.new_zeros(num_rows(self.divergence, samples=samples, has_target=self.target is not None), 0)

    def tiles(self, hidden: torch.Tensor, *, with_target: bool = True) -> Iterator[Tile]:
        """Logits of one tile of positions after another, in buffers that they share."""
        size, device = len(self.weights), self.weights.device.type
        row_bytes = self.student.num_tokens * self.weights.element_size()
        budget = TILE_BYTES.get(device, TILE_BYTES["cpu"])
        step = max(1, min(self.tile_tokens or max(MIN_TILE_TOKENS, budget // row_bytes), size))
        target = self.target if with_target else None
        shape, num_buffers = (step, self.student.num_tokens), 1 + (target.num_tiles if target is not None else 0)
        buffers = [self.weights.new_empty(shape) for _ in range(num_buffers)]
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            student, *views = (buffer[: rows.stop - start] for buffer in buffers)
            self.student.write_logits(hidden[rows], student)
            logits = (None, None) if target is None else target.write_logits(self.teacher, rows, views)
            yield Tile(rows, student, *logits)

    def sweep_tile(self, tile: Tile, judge: Callable) -> torch.Tensor:
        """Diagnostics (6 or 8, n) of a tile by `judge`; where that gives a gradient, `tile.student` holds it afterwards."""
        row_bytes = tile.student.shape[1] * tile.student.element_size()
        budget, size = BLOCK_BYTES.get(tile.student.device.type, BLOCK_BYTES["cpu"]), len(tile.student)
        diagnostics, step = [], max(1, budget // row_bytes)
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            logits, target = tile.student[rows], None
            if tile.anchor is not None:
                direction = None if tile.direction is None else tile.direction[rows]
                target = self.target.shift_logits(tile.anchor[rows], direction)
            stats, gradient = judge(slice(tile.rows.start + rows.start, tile.rows.start + rows.stop), logits, target)
            diagnostics.append(stats)
            if gradient is not None:
                logits.copy_(self.student.through_softcap(gradient, logits))
        return torch.cat(diagnostics, dim=1)

    def write_gradients(self, tile: Tile, weights: torch.Tensor, hidden: torch.Tensor, gradients: Gradients) -> None:
        """Add a tile's, whose logits its gradient has replaced: `weights` of the tile, `hidden` of all positions."""
        rows, first = tile.rows, tile.rows.start == 0
        own = gradients if gradients.hidden is None else gradients._replace(hidden=gradients.hidden[rows])
        self.student.write_gradients(tile.student, weights, hidden[rows], *own, first=first)

    def judge(self, rows: slice, student: torch.Tensor, target: torch.Tensor | None, *, with_gradient: bool):
        """Diagnostics, and the divergence's gradient or None, of the positions `rows` from their logits (n, V)."""
        token_ids = None if self.token_ids is None else self.token_ids[rows]
        if target is None:
            return sweep_sampled(student, token_ids), None
        run = _sweep_by(self.compiled)
        return run(student, target, self.divergence, token_ids, with_gradient=with_gradient)


class Tile(NamedTuple):
    """Logits (n, V) of the positions `rows`: the student's, the target's anchor and direction, None where not read."""

    rows: slice
    student: torch.Tensor
    anchor: torch.Tensor | None
    direction: torch.Tensor | None


class Gradients(NamedTuple):
    """What the gradients of hidden states (n, H), weight (V, H) and bias (V,) are written to; None where not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def wanted(self) -> bool:
        """Whether there is any to write."""
        return any(gradient is not None for gradient in self)


class FusedDivergence(torch.autograd.Function):
    """Loss and diagnostics of n positions; hidden (n, H), weight (V, H), bias (V,) or None."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work: Work, grad_enabled: bool):
        make = torch.empty_like if len(work.weights) else torch.zeros_like  # a first tile overwrites
        accumulated = [
            make(x, dtype=work.weights.dtype) if x is not None and needed and grad_enabled else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            loss, stats = work.run(hidden, Gradients(*accumulated))
        ctx.save_for_backward(*accumulated)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        # In place, unless a second backward may come: another V x H tensor would be the largest of the loss.
        scale = torch.mul if _graph_is_kept() else torch.Tensor.mul_
        grads = [
            None if total is None else scale(total, grad_loss).to(dtype)
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


@functools.cache
def _sweep_by(compiled: bool | str) -> Callable:
    """`sweep`, or the same as one kernel or few: compiled at its first call of each kind, or ours."""
    if compiled == "kernel":
        try:
            from .sweep_kernel import sweep_by_kernel
        except ImportError as error:
            raise ValueError("compiled='kernel' needs Triton: `pip install triton`, or set compiled=False.") from error
        return sweep_by_kernel
    if compiled not in (True, False):
        raise ValueError(f"compiled={compiled!r} is neither True, False nor 'kernel'.")
    return torch.compile(sweep) if compiled else sweep


def _graph_is_kept() -> bool:
    """Whether the backward that runs now was called with `retain_graph`; True where torch does not say."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
