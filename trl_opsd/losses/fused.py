# SPDX-License-Identifier: Apache-2.0
"""The loss from hidden states, without logits of the whole batch.

Differences to the plain form in `dense.py`:
1. Logits exist for a tile of positions at a time, with the whole vocabulary of each.
2. The gradient is taken in the forward, in closed form: no tile is computed twice, only the gradient is kept.
3. Positions of weight 0 are never projected.
4. Elementwise work goes over a few rows at a time, so that it stays near the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .closed_form import FusedDiagnostics
from .divergences import Divergence, compute_dtype, require_positive
from .facts import Facts, check_columns, columns_at
from .head import OutputHead
from .projection import Projection, product_dtype
from .shapes import check_num_tokens
from .target import Target
from .tiles import FusedDivergence, Work, nonzero_positions


def fused_divergence(
    student_hidden: torch.Tensor,
    head: OutputHead,
    target: Target,
    *,
    token_weights: torch.Tensor,
    divergence: Divergence,
    num_tokens: int | None = None,
    tile_tokens: int | None = None,
    positions: torch.Tensor | None = None,
    compiled: bool | str = False,
    token_ids: torch.Tensor | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
    weight_of: Callable[[Facts], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """Weighted sum over positions of the divergence between student and target, from final hidden states.

    Logits are those of the heads, divided by the temperature; the target is `anchor + shape(direction)` of such logits.
    Gradients go to `student_hidden` and to the weight and bias of `head`, and nowhere else. Under no_grad only the
    values are computed. Autocast has no effect but on the dtype that products take on CUDA.

    Args:
        student_hidden: (N, H) final hidden states of the student.
        head: its output head.
        target: of the same N positions, with any leading dimensions. Without a head of its own it takes `head`, detached.
        token_weights: (N,) of any sign, see [`token_weights`]; 0 leaves a position out, whatever its hidden states hold.
            Where a weight is negative the divergence is ascended.
        divergence: name, temperature, clip, support and floors.
        num_tokens: compare the first `num_tokens` rows of the heads only, in [1, V]; None for all.
        tile_tokens: positions per tile, >= 1; None sizes a tile by `TILE_BYTES`.
        positions: (n,) int64, where `token_weights` is not 0, if that is known; to find it a GPU must be waited for.
        compiled: fuse the elementwise work: True with `torch.compile` (Triton on a GPU, a C++ compiler on a CPU), "kernel"
            with `sweep_kernel`, which has no support, floor or `entropy_top_k` and has run in Triton's interpreter alone.
        token_ids: (N,) int64 sampled tokens, in [0, num_tokens) where the weight is not 0, if their log-probabilities are
            wanted: in the facts and in the diagnostics.
        given: columns (N,) or (K, N), and 0-d tensors, that the facts hold for `weight_of`.
        weight_of: factor of `token_weights`, of any sign, from the facts of some positions: (n,), position by position, for
            it is called once a tile. No gradient goes through it.

    Returns:
        0-d loss, float32 or float64, and the diagnostics of every position.

    Raises:
        ValueError: for shapes that do not match, a setting out of range or, with `compiled="kernel"`, one that the kernel has not, or a direction under a head that caps its
            logits: there the logits of a sum of hidden states are not the sum of the views' logits.
    """
    check_shapes(student_hidden, head, target, token_weights.shape, tile_tokens)
    check_columns(token_ids, given, len(token_weights))
    head = head.first_rows(check_num_tokens(num_tokens, head.weight.shape[0]))
    if positions is None:
        positions = nonzero_positions(token_weights)
    work = Work(
        **at_positions(student_hidden, head, target, divergence, positions, token_ids),
        weights=token_weights.detach()[positions].to(compute_dtype(student_hidden.dtype)),
        given=columns_at(given, positions),
        tile_tokens=tile_tokens,
        compiled=compiled,
        weight_of=weight_of,
    )
    return evaluate(work, student_hidden, head, positions)


def at_positions(student_hidden, head, target, divergence, positions, token_ids) -> dict[str, Any]:
    """The fields of a `Work` that all fused losses make alike."""
    settings = divergence.temperature, product_dtype(student_hidden)
    student = teacher = Projection.of(head, *settings)
    if target is not None and target.head is not None:
        teacher = Projection.of(target.head.first_rows(student.num_tokens), *settings)
    return {
        "student": student,
        "teacher": teacher,
        "target": None if target is None else target.at(positions),
        "divergence": divergence,
        "token_ids": None if token_ids is None else token_ids[positions],
    }


def evaluate(work: Work, student_hidden, head, positions) -> tuple[torch.Tensor, FusedDiagnostics]:
    """Loss and diagnostics, these again for all positions."""
    loss, stats = FusedDivergence.apply(
        student_hidden.index_select(0, positions), head.weight, head.bias, work, torch.is_grad_enabled()
    )
    full = stats.new_zeros(len(stats), len(student_hidden))
    return loss, FusedDiagnostics(*full.index_copy_(1, positions, stats).unbind(0))


def check_shapes(student_hidden, head, target, shape, tile_tokens) -> None:
    """Refuse hidden states and heads that do not fit positions of `shape`, (N,)."""
    wanted, states = (*shape, head.weight.shape[-1]), {"student_hidden": student_hidden}
    if target is not None:
        states["target.anchor"] = target.anchor.flatten(0, -2)
    for field, hidden in states.items():
        if tuple(hidden.shape) != wanted or hidden.ndim != 2:
            raise ValueError(
                f"{field} has shape {tuple(hidden.shape)}; pass (N, H) = {wanted}, one row per token weight and the "
                "width of the head."
            )
    if head.logit_softcap is not None:
        require_positive("logit_softcap", head.logit_softcap, hint=", or None for a linear head")
        if target is not None and target.direction is not None:
            raise ValueError(
                f"shape={target.shape} with logit_softcap={head.logit_softcap}: a head that caps its logits is not linear, "
                "so a sum of hidden states has no meaning to it. Use a target without a direction."
            )
    if tile_tokens is not None and tile_tokens < 1:
        raise ValueError(
            f"tile_tokens={tile_tokens} is below 1; set a number of positions, or None for a size by bytes."
        )
