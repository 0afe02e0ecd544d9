# SPDX-License-Identifier: Apache-2.0
"""The plain form of the loss from hidden states: all logits at once, differentiated by autograd.

It says in a few lines what `fused.py` computes, and is what the tests compare that with.
"""

from __future__ import annotations

import torch

from .closed_form import FusedDiagnostics
from .divergences import Divergence, clip_and_sum, clipped_terms, compute_dtype, divergence_terms
from .head import OutputHead
from .target import Target
from .weights import weighted_sum


def dense_divergence_from_hidden(
    student_hidden: torch.Tensor,
    head: OutputHead,
    target: Target,
    *,
    token_weights: torch.Tensor,
    divergence: Divergence,
    num_tokens: int | None = None,
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """As [`fused_divergence`] in arguments and results, with (N, V) logits and no check of shapes."""
    dtype = compute_dtype(student_hidden.dtype)

    def project(hidden, head, with_bias=True):
        logits = hidden.flatten(0, -2).to(dtype) @ head.weight[:num_tokens].to(dtype).T
        if with_bias and head.bias is not None:
            logits = logits + head.bias[:num_tokens]
        logits = head.logit_scale * logits
        if head.logit_softcap is not None:
            logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
        return logits / divergence.temperature

    log_q = project(student_hidden, head).log_softmax(-1)
    with torch.no_grad():
        teacher = target.head or head
        logits = project(target.anchor, teacher)
        if target.direction is not None:
            logits = target.shift_logits(logits, project(target.direction, teacher, with_bias=False))
        log_p = logits.log_softmax(-1)
    terms = divergence_terms(log_q, log_p, divergence)
    loss = clip_and_sum(terms, divergence)
    diagnostics = _diagnostics(loss.detach(), terms.detach(), log_q.detach(), log_p, divergence)
    kept = token_weights != 0
    zeroed = FusedDiagnostics(*(row.masked_fill(~kept, 0.0) for row in diagnostics))
    return weighted_sum(loss, token_weights.detach().to(dtype)), zeroed


def _diagnostics(loss, terms, log_q, log_p, divergence: Divergence) -> FusedDiagnostics:
    return FusedDiagnostics(
        loss=loss,
        unclipped=terms.sum(-1),
        clipped_share=clipped_terms(terms, divergence).to(loss.dtype).mean(-1),
        student_entropy=torch.special.entr(log_q.exp()).sum(-1),
        target_entropy=torch.special.entr(log_p.exp()).sum(-1),
        top_agreement=(log_q.argmax(-1) == log_p.argmax(-1)).to(loss.dtype),
    )
