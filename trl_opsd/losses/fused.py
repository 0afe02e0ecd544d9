# SPDX-License-Identifier: Apache-2.0
"""The loss from hidden states, without logits of the whole batch.

Differences to the plain form in `dense.py`:
1. Logits exist for a tile of positions at a time, with the whole vocabulary of each.
2. The gradient is taken in the forward, in closed form: no tile is computed twice, only the gradient is kept.
3. Positions of weight 0 are never projected.
4. Elementwise work goes over a few rows at a time, so that it stays near the cache.
"""

from __future__ import annotations

import torch

from .closed_form import FusedDiagnostics
from .divergences import Divergence
from .targets import Shape, check_num_tokens
from .tiles import fused_loss, head_projection, whole_head
from .views import TargetViews, Views, select_views


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
    positions: torch.Tensor | None = None,
    compiled: bool = False,
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
        positions: (n,) int64, where `token_weights` is not 0, if that is known; to find it a GPU must be waited for.
        compiled: fuse the elementwise work with `torch.compile`, which needs Triton on a GPU and a C++ compiler on a CPU.

    Returns:
        0-d loss, float32 or float64, and the diagnostics of every position.

    Raises:
        ValueError: for shapes that do not match or a setting out of range.
    """
    linear_head = logit_softcap is None
    _check(student_hidden, head_weight, anchor_hidden, direction_hidden, token_weights, shape)
    count = check_num_tokens(num_tokens, head_weight.shape[0])
    head = target_head = whole_head(head_weight, head_bias, count)
    if target_head_weight is not None:
        target_head = whole_head(target_head_weight, target_head_bias, count)
    logit_settings = {"logit_scale": logit_scale, "softcap": logit_softcap}

    def target_at(positions: torch.Tensor) -> TargetViews:
        if not linear_head:
            _check_apart(direction_hidden)
        return TargetViews(
            head_projection(target_head, student_hidden, divergence, logit_settings),
            select_views(anchor_hidden, positions, linear_head=linear_head),
            select_views(direction_hidden, positions, linear_head=linear_head),
            shape,
        )

    settings = {"positions": positions, "compiled": compiled, **logit_settings}
    return fused_loss(student_hidden, head, target_at, token_weights, divergence, tile_tokens, **settings)


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


def _check_apart(direction_hidden: Views | None) -> None:
    if torch.is_tensor(direction_hidden):
        raise ValueError(
            "direction_hidden is one tensor, but with a logit_softcap the head is not linear; pass the "
            "views it was made of as pairs (weight, hidden)."
        )


def _tensors(views: Views | None) -> list[torch.Tensor]:
    if views is None or torch.is_tensor(views):
        return [] if views is None else [views]
    return [hidden for _, hidden in views]
