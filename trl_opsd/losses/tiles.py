# SPDX-License-Identifier: Apache-2.0
"""The machine under the fused losses: tiles of logits, swept once for value, diagnostics and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .closed_form import FusedDiagnostics, sweep
from .divergences import Divergence
from .projection import Projection
from .target import Target

# Bytes of one tile, and of the part of it that the elementwise work handles at a time. On a CPU 1 MiB is
# fastest on one idle core; 8 MiB costs a few percent there and makes far fewer thread barriers, which are
# slow on a busy machine.
TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
# Below some 256 rows the products are slower: by 10 % at 128, by 30 % at 64 (docs/log.md).
MIN_TILE_TOKENS = 256
# Nats that only `LOWEST_BIAS` on one side alone can give: a token that one distribution has and the other cannot have.
_INFINITE = 1e15


def nonzero_positions(mask: torch.Tensor) -> torch.Tensor:
    """(n,) places of a flattened mask that are not 0; waits for the device."""
    return mask.flatten().nonzero().squeeze(-1)


@dataclass(frozen=True)
class Work:
    """All that is constant in the loss of n positions, those whose weight is not 0.

    Attributes:
        student: the student's head, as its hidden states are projected with it.
        teacher: the target's head, likewise.
        target: of the n positions.
        divergence: its temperature is in the projections.
        weights: (n,) float32 or float64.
        tile_tokens, compiled: as in [`fused_divergence`].
    """

    student: Projection
    teacher: Projection
    target: Target
    divergence: Divergence
    weights: torch.Tensor
    tile_tokens: int | None
    compiled: bool

    def tiles(self) -> tuple[list[slice], list[torch.Tensor]]:
        """Slices of positions and the buffers (tile, V) they share: the student's, then the target's."""
        size, device = len(self.weights), self.weights.device.type
        row_bytes = self.student.num_tokens * self.weights.element_size()
        budget = TILE_BYTES.get(device, TILE_BYTES["cpu"])
        step = max(1, min(self.tile_tokens or max(MIN_TILE_TOKENS, budget // row_bytes), size))
        shape = (step, self.student.num_tokens)
        rows = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        return rows, [self.weights.new_empty(shape) for _ in range(1 + self.target.num_tiles)]

    def sweep_tile(self, student_logits, target_logits, direction_logits, *, with_gradient: bool) -> torch.Tensor:
        """Diagnostics (6, n) of a tile; with a gradient, `student_logits` (n, V) holds it afterwards."""
        row_bytes = student_logits.shape[1] * student_logits.element_size()
        budget = BLOCK_BYTES.get(student_logits.device.type, BLOCK_BYTES["cpu"])
        diagnostics, judge = [], _compiled_sweep() if self.compiled else sweep
        for start in range(0, len(student_logits), max(1, budget // row_bytes)):
            rows = slice(start, start + max(1, budget // row_bytes))
            direction = None if direction_logits is None else direction_logits[rows]
            logits, target = student_logits[rows], self.target.shift_logits(target_logits[rows], direction)
            stats, gradient = judge(logits, target, self.divergence, with_gradient=with_gradient)
            diagnostics.append(stats)
            if with_gradient:
                logits.copy_(self.student.through_softcap(gradient, logits))
        return torch.cat(diagnostics, dim=1)


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
            stats = _run(hidden, work, *accumulated)
        ctx.save_for_backward(*accumulated)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(stats)
        return (stats[0] * work.weights).sum(), stats

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
def _compiled_sweep() -> Callable:
    """`sweep` as one kernel or few; compiled at its first call of each kind."""
    return torch.compile(sweep)


def _graph_is_kept() -> bool:
    """Whether the backward that runs now was called with `retain_graph`; True where torch does not say."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def _run(hidden, work: Work, grad_hidden, grad_weight, grad_bias) -> torch.Tensor:
    """Diagnostics (6, n); writes the gradients of the three that are given."""
    with_gradient = any(grad is not None for grad in (grad_hidden, grad_weight, grad_bias))
    diagnostics = [work.weights.new_zeros(len(FusedDiagnostics._fields), 0)]
    slices, buffers = work.tiles()
    for rows in slices:
        student, *target = (buffer[: rows.stop - rows.start] for buffer in buffers)
        work.student.write_logits(hidden[rows], student)
        logits = work.target.write_logits(work.teacher, rows, target)
        diagnostics.append(work.sweep_tile(student, *logits, with_gradient=with_gradient))
        if with_gradient:
            own, first = None if grad_hidden is None else grad_hidden[rows], rows.start == 0
            grads = own, grad_weight, grad_bias
            work.student.write_gradients(student, work.weights[rows], hidden[rows], *grads, first=first)
    diagnostics = torch.cat(diagnostics, dim=1)
    return diagnostics.masked_fill_(diagnostics > _INFINITE, torch.inf)
