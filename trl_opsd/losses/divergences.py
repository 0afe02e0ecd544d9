# SPDX-License-Identifier: Apache-2.0
"""Per-token divergences between the student and a frozen target, over the full vocabulary.

These are the plain forms, differentiated by autograd. `fused.py` computes the same numbers from hidden states
without logits of the whole batch, and the tests hold the two equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .forms import FORMS
from .support import WHOLE, Places, Support

DIVERGENCES = tuple(FORMS)
CLIPS = (None, "upper", "symmetric", "token")


@dataclass(frozen=True)
class Divergence:
    """Which divergence is measured, at which temperature, and how it is clipped.

    Args:
        name: `forward_kl` is KL(target || student), `reverse_kl` is KL(student || target). With the mixture
            m = w target + (1 - w) student, `skewed_forward_kl` is KL(target || m), `skewed_reverse_kl` is
            KL(student || m), and `jsd` is w times the first plus (1 - w) times the second. `policy_reverse_kl` is reverse KL
            as the policy gradient of tokens whose log-ratio is a constant reward.
        mixture_weight: w above, in (0, 1). Only these three read it.
        temperature: both logits are divided by it, > 0.
        clip: None, `upper` (each vocabulary entry's term is cut at `clip_value`, OPSD), `symmetric` (each
            term is kept within plus and minus `clip_value`, OGLS-SD) or `token` (the summed value is cut at
            `clip_value`). A term that is cut has no gradient, and a sum of cut terms may be negative.
        clip_value: the bound in nats, > 0.
        support: the tokens that are compared; None for all.
        target_floor: lowest probability of a compared entry of the target, in (0, 1), or None (DemoPSD, arXiv
            2607.02502, has 1e-8).
        relative_floor: lowest ratio of a compared entry of the target to the student's, held constant, in (0, 1), or
            None (RESD, arXiv 2605.12741). A floored target is not normalised again, so a divergence may be below 0.
        entropy_top_k: also find, for the facts, the target's entropy over its so many likeliest tokens, renormalised, >= 1 (MSD,
            arXiv 2605.02971, has 32); None leaves it out. It changes no divergence.

    Raises:
        ValueError: for a value outside these ranges.
    """

    name: str = "forward_kl"
    mixture_weight: float = 0.5
    temperature: float = 1.0
    clip: str | None = None
    clip_value: float = 0.05
    support: Support | None = None
    target_floor: float | None = None
    relative_floor: float | None = None
    entropy_top_k: int | None = None

    def __post_init__(self):
        if self.entropy_top_k is not None and self.entropy_top_k < 1:
            raise ValueError(f"entropy_top_k={self.entropy_top_k} keeps no token; set 1 or more, or None.")
        if self.name not in DIVERGENCES:
            raise ValueError(f"divergence={self.name!r} is not known; set one of {DIVERGENCES}.")
        if self.clip not in CLIPS:
            raise ValueError(f"clip={self.clip!r} is not known; set one of {CLIPS}.")
        if not 0 < self.mixture_weight < 1:
            raise ValueError(
                f"mixture_weight={self.mixture_weight} is outside (0, 1); set a weight between the two, or "
                "divergence='forward_kl' or 'reverse_kl' for the ends."
            )
        if self.support is not None and self.support.remainder == WHOLE and self.name != "policy_reverse_kl":
            raise ValueError(
                f"divergence={self.name!r} with remainder={WHOLE!r}: what is kept is no distribution, so there is no divergence. "
                "Set divergence='policy_reverse_kl', or remainder='tail' or 'renormalise'."
            )
        require_positive("temperature", self.temperature)
        require_positive("clip_value", self.clip_value, hint=", or clip=None for no clip")
        for field in ("target_floor", "relative_floor"):
            floor = getattr(self, field)
            if floor is not None and not 0 < floor < 1:
                raise ValueError(f"{field}={floor} is outside (0, 1); set a number between, or None for no floor.")


def require_positive(field: str, value: float, hint: str = "") -> None:
    """Raise a ValueError that names `field` unless `value` is a finite number > 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{field}={value} is not a finite number > 0; set one{hint}.")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which logits of `dtype` are compared: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_divergence(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    divergence: str = "forward_kl",
    mixture_weight: float = 0.5,
    temperature: float = 1.0,
    clip: str | None = None,
    clip_value: float = 0.05,
    support: Support | None = None,
    target_floor: float | None = None,
    relative_floor: float | None = None,
) -> torch.Tensor:
    """Divergence of every position, summed over the vocabulary or the support (clips of arXiv 2601.18734 and 2605.12400).

    Args:
        student_logits: (..., V), finite. The only input with a gradient.
        target_logits: (..., V), detached. An entry of -inf has probability 0: `reverse_kl` is infinite by
            definition there and has no usable gradient; every other divergence stays finite.
        divergence, mixture_weight, temperature, clip, clip_value, support, target_floor, relative_floor: see
            [`Divergence`].

    Returns:
        (...) in nats; float64 for float64 logits, float32 otherwise. At least 0 without an entry-wise clip or a floor.

    Raises:
        ValueError: for a setting out of range, shapes that differ, logits that are not floating point.
    """
    floors = target_floor, relative_floor
    rule = Divergence(divergence, mixture_weight, temperature, clip, clip_value, support, *floors)
    log_q, log_p = log_probs(student_logits, target_logits, rule.temperature)
    return clip_and_sum(divergence_terms(log_q, log_p, rule), rule)


def log_probs(
    student_logits: torch.Tensor, target_logits: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the student and, detached, of the target at `temperature`, in float32 or float64.

    Raises:
        ValueError: for shapes that differ or logits that are not floating point.
    """
    for field, logits in (("student_logits", student_logits), ("target_logits", target_logits)):
        if not logits.is_floating_point():
            raise ValueError(f"{field} has dtype {logits.dtype}; pass floating-point logits.")
    if student_logits.shape != target_logits.shape:
        raise ValueError(
            f"target_logits has shape {tuple(target_logits.shape)} and student_logits "
            f"{tuple(student_logits.shape)}; pass equal shapes (..., V)."
        )
    dtype = compute_dtype(torch.promote_types(student_logits.dtype, target_logits.dtype))
    log_q = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_p = torch.log_softmax(target_logits.detach().to(dtype) / temperature, dim=-1)
    return log_q, log_p


def divergence_terms(
    log_q: torch.Tensor, log_p: torch.Tensor, rule: Divergence, token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Terms (..., V), or those of the rule's support, that sum to the unclipped divergence; `token_ids` as in `compared`.

    A term is exactly 0 where log_q equals log_p, unless a floor raised log_p.
    """
    log_q, log_p, _ = compared(log_q, log_p, log_q.exp(), log_p.exp(), rule, token_ids)
    return FORMS[rule.name].terms(log_q, log_p, rule.mixture_weight)


def compared(
    log_q: torch.Tensor,
    log_p: torch.Tensor,
    q: torch.Tensor,
    p: torch.Tensor,
    rule: Divergence,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Places | None]:
    """Log-probabilities of student and target that the rule compares, and which tokens' they are; None for all.

    Args:
        log_q, log_p: (..., V) of the whole vocabulary.
        q, p: their probabilities.
        rule: its support and floors.
        token_ids: (...) sampled tokens, where the support is the sampled token.
    """
    support = rule.support
    places = None if support is None else support.places(log_q, log_p, token_ids)
    if places is None:
        return log_q, floored(log_q, log_p, rule), None
    log_q, log_p = support.restrict(log_q, q, places), support.restrict(log_p, p, places)
    log_p = floored(log_q, log_p, rule)
    return support.leave_out(log_q, places), support.leave_out(log_p, places), places


def floored(log_q: torch.Tensor, log_p: torch.Tensor, rule: Divergence) -> torch.Tensor:
    """`log_p` (...) under the rule's floors, detached; `log_q` (...) is the student's of the same entries."""
    if rule.target_floor is not None:
        log_p = log_p.clamp(min=math.log(rule.target_floor))
    if rule.relative_floor is not None:
        log_p = torch.maximum(log_p, log_q.detach() + math.log(rule.relative_floor))
    return log_p


def top_entropy(log_p: torch.Tensor, k: int) -> torch.Tensor:
    """Entropy (...) in nats of the k likeliest entries of log-probabilities (..., V), renormalised; of all V where k is more."""
    kept = log_p.topk(min(k, log_p.shape[-1]), dim=-1, sorted=False).values.log_softmax(-1)
    return torch.special.entr(kept.exp()).sum(-1)


def clipped_terms(terms: torch.Tensor, rule: Divergence) -> torch.Tensor:
    """Which terms (..., V) the rule's clip cuts; (..., 1) for the `token` clip, which cuts the position's sum."""
    if rule.clip == "token":
        return terms.sum(-1, keepdim=True) > rule.clip_value
    if rule.clip is None:
        return torch.zeros_like(terms, dtype=torch.bool)
    return (terms.abs() if rule.clip == "symmetric" else terms) > rule.clip_value


def clip_and_sum(terms: torch.Tensor, rule: Divergence) -> torch.Tensor:
    """Sum of the terms (..., V) over V under the rule's clip, (...)."""
    if rule.clip == "upper":
        terms = terms.clamp(max=rule.clip_value)
    elif rule.clip == "symmetric":
        terms = terms.clamp(-rule.clip_value, rule.clip_value)
    value = terms.sum(-1)
    return value.clamp(max=rule.clip_value) if rule.clip == "token" else value
