# SPDX-License-Identifier: Apache-2.0
"""The plain form of the loss from hidden states: all logits at once, differentiated by autograd.

It says in a few lines what `fused.py` computes, and is what the tests compare that with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .closed_form import FusedDiagnostics
from .divergences import Divergence, clip_and_sum, clipped_terms, compute_dtype, divergence_terms, top_entropy
from .facts import Facts
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
    token_ids: torch.Tensor | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
    weight_of: Callable[[Facts], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """As [`fused_divergence`] in arguments and results, with (N, V) logits and no check of shapes."""
    facts, rest = _facts(student_hidden, head, target, divergence, num_tokens, token_ids, given)
    factor = torch.ones_like(facts.student_entropy) if weight_of is None else weight_of(facts).detach()
    kept = token_weights != 0
    loss = weighted_sum(facts.clipped_divergence, token_weights.detach().to(factor.dtype) * factor)
    return loss, _diagnostics(facts, rest, factor, kept)


def dense_fact_loss(
    student_hidden: torch.Tensor,
    head: OutputHead,
    target: Target | None,
    *,
    token_ids: torch.Tensor,
    loss_of: Callable[[Facts], torch.Tensor],
    given: Mapping[str, torch.Tensor] | None = None,
    divergence: Divergence | None = None,
    num_tokens: int | None = None,
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """As [`fused_fact_loss`] in arguments and results, with (N, V) logits of all positions and no check of shapes."""
    facts, rest = _facts(student_hidden, head, target, divergence or Divergence(), num_tokens, token_ids, given)
    loss, weight = loss_of(facts).sum(), torch.zeros_like(facts.student_entropy)
    if target is not None:
        (slope,) = torch.autograd.grad(loss, facts.clipped_divergence, retain_graph=True, allow_unused=True)
        weight = weight if slope is None else slope
    return loss, _diagnostics(facts, rest, weight, torch.ones_like(weight, dtype=torch.bool))


def _facts(student_hidden, head, target, rule, num_tokens, token_ids, given) -> tuple[Facts, dict]:
    """Facts whose log-probability and divergences are differentiable, and the rest of the diagnostics."""
    dtype = compute_dtype(student_hidden.dtype)

    def project(hidden, head, with_bias=True):
        logits = hidden.flatten(0, -2).to(dtype) @ head.weight[:num_tokens].to(dtype).T
        if with_bias and head.bias is not None:
            logits = logits + head.bias[:num_tokens]
        logits = head.logit_scale * logits
        if head.logit_softcap is not None:
            logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
        return logits / rule.temperature

    log_q = project(student_hidden, head).log_softmax(-1)
    log_prob = None if token_ids is None else log_q.gather(-1, token_ids[:, None]).squeeze(-1)
    student_entropy = torch.special.entr(log_q.detach().exp()).sum(-1)
    if target is None:
        return Facts(log_prob, None, student_entropy, None, None, None, given or {}), {}
    with torch.no_grad():
        teacher = target.head or head
        logits = project(target.anchor, teacher)
        if target.direction is not None:
            logits = target.shift_logits(logits, project(target.direction, teacher, with_bias=False))
        log_p = logits.log_softmax(-1)
    terms = divergence_terms(log_q, log_p, rule, token_ids)
    clipped = clip_and_sum(terms, rule)
    facts = Facts(
        log_prob=log_prob,
        target_log_prob=None if token_ids is None else log_p.gather(-1, token_ids[:, None]).squeeze(-1),
        student_entropy=student_entropy,
        target_entropy=torch.special.entr(log_p.exp()).sum(-1),
        divergence=terms.sum(-1) if rule.clip is not None else clipped,
        clipped_divergence=clipped,
        given=given or {},
        target_top_entropy=None if rule.entropy_top_k is None else top_entropy(log_p, rule.entropy_top_k),
    )
    return facts, {
        "clipped_share": clipped_terms(terms.detach(), rule).to(dtype).mean(-1),
        "top_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).to(dtype),
    }


def _diagnostics(facts: Facts, rest: dict, weight: torch.Tensor, kept: torch.Tensor) -> FusedDiagnostics:
    zero = torch.zeros_like(facts.student_entropy)
    values = {
        "loss": facts.clipped_divergence,
        "unclipped": facts.divergence,
        "clipped_share": zero,
        "student_entropy": facts.student_entropy,
        "target_entropy": facts.target_entropy,
        "top_agreement": zero,
        "log_prob_ratio": None if facts.target_log_prob is None else facts.log_prob_ratio,
        "weight": weight,
        **rest,
    }
    rows = {name: zero if value is None else value.detach() for name, value in values.items()}
    return FusedDiagnostics(**{name: row.masked_fill(~kept, 0.0) for name, row in rows.items()})
