# SPDX-License-Identifier: Apache-2.0
"""The loss from hidden states, without logits of the whole batch.

Differences to the plain form in `dense.py`:
1. Logits exist for a tile of positions at a time, with the whole vocabulary of each.
2. The gradient is taken in the forward, in closed form: no tile is computed twice, only the gradient is kept.
3. Positions of weight 0 are never projected.
4. Elementwise work goes over a few rows at a time, so that it stays near the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from .closed_form import FusedDiagnostics, sweep
from .divergences import Divergence, compute_dtype, require_positive
from .projection import Projection, product_dtype
from .targets import Shape, check_num_tokens
from .views import TargetViews, Views, select_views

# Bytes of one tile, and of the part of it that the elementwise work handles at a time. On a CPU 1 MiB is
# fastest on one idle core; 8 MiB costs a few percent there and makes far fewer thread barriers, which are
# slow on a busy machine.
TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
MIN_TILE_TOKENS = 16


def fused_divergence(
    student_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    anchor_hidden: Views,
    direction_hidden: Views | None = None,
    *,
    token_weights: torch.Tensor,
    divergence: Divergence,
    shape: Shape,
    head_bias: torch.Tensor | None = None,
    target_head_weight: torch.Tensor | None = None,
    target_head_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_tokens: int | None = None,
    tile_tokens: int | None = None,
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """Weighted sum over positions of the divergence between student and target, from final hidden states.

    Logits are `softcap(logit_scale * (W h + b)) / temperature`; the target is `anchor + shape(direction)` of
    such logits. Gradients go to `student_hidden`, `head_weight` and `head_bias`, and nowhere else. Under
    no_grad only the values are computed. Autocast has no effect but on the dtype that products take on CUDA.

    Args:
        student_hidden: (N, H) final hidden states of the student.
        head_weight: (V, H) output head, whole; a DTensor is gathered once.
        anchor_hidden: (N, H) frozen final hidden states of the view the target starts from, or pairs
            (weight, (N, H)) whose logits' weighted mean it starts from: each weight a float or (N,), 1 in sum.
        direction_hidden: (N, H), or pairs (weight, (N, H)) whose weighted sum it is, each weight a float or
            (N,). Only pairs with a `logit_softcap`. None exactly where the shape reads no direction.
        token_weights: (N,), see [`token_weights`]; 0 leaves a position out, whatever its hidden states hold.
        divergence: name, temperature and clip.
        shape: how the direction enters.
        head_bias: (V,) or None.
        target_head_weight: (V, H) frozen head of the target; None takes `head_weight` and `head_bias`,
            detached.
        target_head_bias: (V,) or None; read with `target_head_weight` only.
        logit_scale: multiplier of the logits (Cohere, Granite), the same for student and target.
        logit_softcap: cap of `cap * tanh(z / cap)` (Gemma), > 0, or None.
        num_tokens: compare the first `num_tokens` rows of the head only, in [1, V]; None for all.
        tile_tokens: positions per tile, >= 1; None sizes a tile by `TILE_BYTES`.

    Returns:
        0-d loss, float32 or float64, and the diagnostics of every position.

    Raises:
        ValueError: for shapes that do not match or a setting out of range.
    """
    _check(student_hidden, head_weight, anchor_hidden, direction_hidden, token_weights, shape)
    if logit_softcap is not None:
        require_positive("logit_softcap", logit_softcap, hint=", or None for a linear head")
        if torch.is_tensor(direction_hidden):
            raise ValueError(
                "direction_hidden is one tensor, but with a logit_softcap the head is not linear; pass the "
                "views it was made of as pairs (weight, hidden)."
            )
    if tile_tokens is not None and tile_tokens < 1:
        raise ValueError(
            f"tile_tokens={tile_tokens} is below 1; set a number of positions, or None for a size by bytes."
        )
    count = check_num_tokens(num_tokens, head_weight.shape[0])
    head = _first_rows(head_weight, count), _first_rows(head_bias, count)
    target_head = head
    if target_head_weight is not None:
        target_head = _first_rows(target_head_weight, count), _first_rows(target_head_bias, count)
    positions = token_weights.nonzero().squeeze(-1)
    logits = partial(
        Projection.of,
        logit_scale=logit_scale,
        softcap=logit_softcap,
        temperature=divergence.temperature,
        dtype=product_dtype(student_hidden),
    )
    work = _Work(
        student=logits(*head),
        target=TargetViews(
            logits(*target_head),
            select_views(anchor_hidden, positions, linear_head=logit_softcap is None),
            select_views(direction_hidden, positions, linear_head=logit_softcap is None),
            shape,
        ),
        divergence=divergence,
        weights=token_weights.detach()[positions].to(compute_dtype(student_hidden.dtype)),
        tile_tokens=tile_tokens,
    )
    loss, stats = _FusedDivergence.apply(
        student_hidden.index_select(0, positions), *head, work, torch.is_grad_enabled()
    )
    full = stats.new_zeros(len(stats), len(token_weights))
    return loss, FusedDiagnostics(*full.index_copy_(1, positions, stats).unbind(0))


def _check(student_hidden, head_weight, anchor_hidden, direction_hidden, token_weights, shape: Shape) -> None:
    wanted = (*token_weights.shape, head_weight.shape[-1])
    anchors, views = _tensors(anchor_hidden), _tensors(direction_hidden)
    named = [("student_hidden", student_hidden), *(("anchor_hidden", view) for view in anchors)]
    for field, hidden in [*named, *(("direction_hidden", view) for view in views)]:
        if tuple(hidden.shape) != wanted or hidden.ndim != 2:
            raise ValueError(
                f"{field} has shape {tuple(hidden.shape)}; pass (N, H) = {wanted}, one row per token weight "
                "and the width of head_weight."
            )
    if not anchors:
        raise ValueError("anchor_hidden has 0 views; pass at least one.")
    if shape.uses_direction != bool(views):
        raise ValueError(
            f"direction_hidden has {len(views)} views but shape={shape} reads {'none' if views else 'some'}; "
            "pass a direction exactly with a LinearShape or BoundedShape."
        )


def _tensors(views: Views | None) -> list[torch.Tensor]:
    if views is None or torch.is_tensor(views):
        return [] if views is None else [views]
    return [hidden for _, hidden in views]


def _first_rows(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The first `count` rows of a head weight or bias, gathered if it is sharded."""
    if tensor is None:
        return None
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor if len(tensor) == count else tensor[:count]


@dataclass(frozen=True)
class _Work:
    """All that is constant in the loss of n positions, those whose weight is not 0."""

    student: Projection
    target: TargetViews
    divergence: Divergence
    weights: torch.Tensor  # (n,)
    tile_tokens: int | None

    def tiles(self) -> tuple[list[slice], list[torch.Tensor]]:
        """Slices of positions and the buffers (tile, V) they share: the student's, then the target's."""
        size, device = len(self.weights), self.weights.device.type
        row_bytes = len(self.student.weight) * self.weights.element_size()
        budget = TILE_BYTES.get(device, TILE_BYTES["cpu"])
        step = max(1, min(self.tile_tokens or max(MIN_TILE_TOKENS, budget // row_bytes), size))
        shape = (step, len(self.student.weight))
        rows = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        return rows, [self.weights.new_empty(shape) for _ in range(1 + self.target.num_tiles)]

    def sweep_tile(self, student_logits, target_logits, direction_logits, *, with_gradient: bool) -> torch.Tensor:
        """Diagnostics (6, n) of a tile; with a gradient, `student_logits` (n, V) holds it afterwards."""
        row_bytes = student_logits.shape[1] * student_logits.element_size()
        budget = BLOCK_BYTES.get(student_logits.device.type, BLOCK_BYTES["cpu"])
        diagnostics = []
        for start in range(0, len(student_logits), max(1, budget // row_bytes)):
            rows = slice(start, start + max(1, budget // row_bytes))
            logits, target = student_logits[rows], target_logits[rows]
            if direction_logits is not None:
                target = target.add_(self.target.shape(direction_logits[rows]))
            stats, gradient = sweep(logits, target, self.divergence, with_gradient=with_gradient)
            diagnostics.append(stats)
            if with_gradient:
                logits.copy_(self.student.through_softcap(gradient, logits))
        return torch.cat(diagnostics, dim=1)


class _FusedDivergence(torch.autograd.Function):
    """Loss and diagnostics of n positions; hidden (n, H), weight (V, H), bias (V,) or None."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work: _Work, grad_enabled: bool):
        accumulated = [
            torch.zeros_like(x, dtype=work.weights.dtype) if x is not None and needed and grad_enabled else None
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
        grads = [
            None if total is None else (total * grad_loss).to(dtype)
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


def _run(hidden, work: _Work, grad_hidden, grad_weight, grad_bias) -> torch.Tensor:
    """Diagnostics (6, n); adds the gradients to those of the three that are given."""
    with_head = grad_weight is not None or grad_bias is not None
    with_gradient = with_head or grad_hidden is not None
    diagnostics = [work.weights.new_zeros(len(FusedDiagnostics._fields), 0)]
    slices, buffers = work.tiles()
    for rows in slices:
        student, *target = (buffer[: rows.stop - rows.start] for buffer in buffers)
        work.student.write_logits(hidden[rows], student)
        views = work.target.write(rows, target)
        diagnostics.append(work.sweep_tile(student, *views, with_gradient=with_gradient))
        if grad_hidden is not None:
            work.student.write_hidden_gradient(student, work.weights[rows], grad_hidden[rows])
        if with_head:
            work.student.add_head_gradient(student, work.weights[rows], hidden[rows], grad_weight, grad_bias)
    return torch.cat(diagnostics, dim=1)
