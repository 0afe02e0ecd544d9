# SPDX-License-Identifier: Apache-2.0
"""The plain form of the loss from hidden states: all logits at once, differentiated by autograd.

It says in a few lines what `fused.py` computes, and is what the tests compare that with.
"""

from __future__ import annotations

import torch

from .closed_form import FusedDiagnostics
from .divergences import Divergence, clip_and_sum, clipped_terms, compute_dtype, divergence_terms
from .reduction import weighted_sum
from .targets import Shape
from .views import Views


def dense_divergence_from_hidden(
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
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """As [`fused_divergence`] in arguments and results, with (N, V) logits and no check of shapes."""
    dtype = compute_dtype(student_hidden.dtype)

    def project(hidden, weight, bias):
        logits = hidden.to(dtype) @ weight[:num_tokens].to(dtype).T
        logits = logit_scale * (logits if bias is None else logits + bias[:num_tokens])
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        return logits / divergence.temperature

    log_q = project(student_hidden, head_weight, head_bias).log_softmax(-1)
    with torch.no_grad():
        if target_head_weight is None:
            target_head_weight, target_head_bias = head_weight, head_bias

        def add_up(views, bias):
            pairs = [(1.0, views)] if torch.is_tensor(views) else views
            return sum(_weighted(weight, project(hidden, target_head_weight, bias)) for weight, hidden in pairs)

        target = add_up(anchor_hidden, target_head_bias)
        if shape.uses_direction:
            target = target + shape(add_up(direction_hidden, None if logit_softcap is None else target_head_bias))
        log_p = target.log_softmax(-1)
    terms = divergence_terms(log_q, log_p, divergence)
    loss = clip_and_sum(terms, divergence)
    diagnostics = _diagnostics(loss.detach(), terms.detach(), log_q.detach(), log_p, divergence)
    kept = token_weights != 0
    zeroed = FusedDiagnostics(*(row.masked_fill(~kept, 0.0) for row in diagnostics))
    return weighted_sum(loss, token_weights.detach().to(dtype)), zeroed


def _weighted(weight: float | torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`weight`, a float or (N,), times the logits (N, V); 0 where it is 0, of -inf too."""
    weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device).unsqueeze(-1)
    return (weight * logits).masked_fill(weight == 0, 0.0)


def _diagnostics(loss, terms, log_q, log_p, divergence: Divergence) -> FusedDiagnostics:
    return FusedDiagnostics(
        loss=loss,
        unclipped=terms.sum(-1),
        clipped_share=clipped_terms(terms, divergence).to(loss.dtype).mean(-1),
        student_entropy=torch.special.entr(log_q.exp()).sum(-1),
        target_entropy=torch.special.entr(log_p.exp()).sum(-1),
        top_agreement=(log_q.argmax(-1) == log_p.argmax(-1)).to(loss.dtype),
    )
