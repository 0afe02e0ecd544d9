# SPDX-License-Identifier: Apache-2.0
"""Divergence over the k likeliest tokens, for targets that were scored elsewhere or to bound memory.

Next to `divergences.py` only the vocabulary differs: entries outside the support are joined in one bucket or
left out by renormalising, so the two remain distributions and the set can never be emptied to lower the loss.
"""

from __future__ import annotations

import torch

from .divergences import Divergence, clip_and_sum, divergence_terms, log_probs

SUPPORTS = ("student", "target", "union")
REMAINDERS = ("tail", "renormalise")


def top_k_divergence(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    k: int,
    support: str = "student",
    remainder: str = "tail",
    divergence: str = "forward_kl",
    mixture_weight: float = 0.5,
    temperature: float = 1.0,
    clip: str | None = None,
    clip_value: float = 0.05,
) -> torch.Tensor:
    """Divergence of every position over a support of likely tokens, a differentiable loss.

    Args:
        student_logits: (..., V), finite. The only input with a gradient.
        target_logits: (..., V), detached.
        k: tokens taken from the student, the target or each, >= 1; k >= V is the full divergence.
        support: `student`, `target` or `union`, whose likeliest tokens are compared.
        remainder: `tail` adds one bucket with the remaining mass of each; `renormalise` divides by the kept
            mass.
        divergence, mixture_weight, temperature, clip, clip_value: see [`Divergence`].

    Returns:
        (...) in nats; float64 for float64 logits, float32 otherwise.

    Raises:
        ValueError: for a setting out of range, shapes that differ, logits that are not floating point.
    """
    rule = Divergence(divergence, mixture_weight, temperature, clip, clip_value)
    _check(k, support, remainder)
    log_q, log_p = log_probs(student_logits, target_logits, rule.temperature)
    kept = _support_mask(log_q, log_p, k, support)
    restrict = _with_tail if remainder == "tail" else _renormalised
    return clip_and_sum(divergence_terms(restrict(log_q, kept), restrict(log_p, kept), rule), rule)


def _check(k: int, support: str, remainder: str) -> None:
    if k < 1:
        raise ValueError(f"k={k} keeps no token; set k >= 1.")
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} is not known; set one of {SUPPORTS}.")
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder={remainder!r} is not known; set one of {REMAINDERS}.")


def _support_mask(log_q: torch.Tensor, log_p: torch.Tensor, k: int, support: str) -> torch.Tensor:
    """(..., V) bool, true for the tokens that are compared one by one."""
    kept = torch.zeros_like(log_p, dtype=torch.bool)
    for side, log_prob in (("student", log_q.detach()), ("target", log_p)):
        if support in (side, "union"):
            kept.scatter_(-1, log_prob.topk(min(k, log_prob.shape[-1]), dim=-1).indices, True)
    return kept


# Both forms write log-probability 0 outside the support, in the student and in the target: the ratio there
# is 1, so every divergence gives it a term of exactly 0, and the fill carries no gradient.


def _with_tail(log_prob: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(..., V + 1): the kept entries, then the remaining mass, floored where nothing remains."""
    tail = log_prob.exp().masked_fill(kept, 0.0).sum(-1, keepdim=True)
    log_tail = tail.clamp(min=torch.finfo(tail.dtype).tiny).log()
    return torch.cat([log_prob.masked_fill(~kept, 0.0), log_tail], dim=-1)


def _renormalised(log_prob: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(..., V): log-probabilities given that the token is in the support."""
    return torch.log_softmax(log_prob.masked_fill(~kept, -torch.inf), dim=-1).masked_fill(~kept, 0.0)
