# SPDX-License-Identifier: Apache-2.0
"""Formulas of the family on the sampled token, as plain functions of facts; for weights and losses made of them.

u = log p(y) - log q(y) is the log-ratio of target and student, A a rollout's advantage. What enters as a constant is
detached by the caller: in a weight of facts all is.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus

_NOTHING = 1e-6  # a mean weight below it is rounding


def half_softplus(log_prob_ratio: torch.Tensor) -> torch.Tensor:
    """phi(u) = (softplus(u) - log 2) / 2 (AntiSD, arXiv 2605.11609), >= -log(2) / 2, in the shape of `log_prob_ratio`.

    With y from the student, -phi(u) grad log q(y) is in expectation the gradient of the Jensen-Shannon divergence.
    """
    return (softplus(log_prob_ratio) - math.log(2)) / 2


def bounded_square(log_prob_ratio: torch.Tensor) -> torch.Tensor:
    """log 2 - softplus(-u^2 / 2), in [0, log 2] (SGSD, arXiv 2605.28791): steepest at |u| = 1.216, flat beyond."""
    return math.log(2) - softplus(-log_prob_ratio.square() / 2)


def sequence_log_ratio(log_prob: torch.Tensor, reference: torch.Tensor | float, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of each sequence of log q(y) - log p(y).

    Args:
        log_prob: (B, D) of the tokens under q.
        reference: (B, D) under p; 0 for the log-probability of q alone.
        mask: (B, D), 0 where a token does not count.

    Returns:
        (B,).
    """
    return (log_prob - reference).masked_fill(mask == 0, 0.0).sum(-1)


def preference_loss(margin: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(m) (PBSD, arXiv 2605.05040), any shape.

    The margin of a pair is m = beta (r(y+) - r(y-)), where r sums log q(y_t) - log p(y_t) over a sequence, y+ is the
    teacher's and y- the student's.
    """
    return softplus(-margin)


def policy_loss(log_prob: torch.Tensor, advantage: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """-A r log q(y), in the shape of all three: what has the gradient of PPO's surrogate, with A and r held constant.

    Args:
        log_prob: log q(y), with its gradient.
        advantage: A, detached.
        ratio: of [`clipped_ratio`], perhaps times an engine's weight.
    """
    return -advantage * ratio * log_prob


def importance_weight(log_prob: torch.Tensor, old_log_prob: torch.Tensor, *, cap: float = 2.0) -> torch.Tensor:
    """min(q(y) / q_old(y), cap), detached: what SDPO (arXiv 2601.20802) weighs its divergence with."""
    return torch.exp(log_prob.detach() - old_log_prob).clamp(max=cap)


def clipped_ratio(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    low: float,
    high: float,
    largest: float | None = None,
) -> torch.Tensor:
    """r = q(y) / q_old(y), or 0 where PPO's clip has cut it, detached, in the shape of all three.

    -A times this times grad log q(y) is the gradient of -min(r A, clip(r, 1 - low, 1 + high) A), whose value it does not keep.

    Args:
        log_prob, old_log_prob: of the sampled token under the student and under the policy that sampled.
        advantage: A; what counts is its sign.
        low, high: PPO's bounds, >= 0.
        largest: r is cut above it where A < 0 too (the dual clip, which TRL calls `delta`); None for no such bound.
    """
    ratio = torch.exp(log_prob.detach() - old_log_prob)
    cut = torch.where(advantage > 0, ratio > 1 + high, ratio < 1 - low)
    if largest is not None:
        cut = cut | (ratio > largest)
    return ratio.masked_fill(cut, 0.0)


def evidence_weight(
    log_prob_ratio: torch.Tensor, advantage: torch.Tensor, *, bound: float, strength: float = 1.0
) -> torch.Tensor:
    """(1 - l) + l clip(exp(sign(A) u), 1 - e, 1 + e), detached: RLSD's weight of the advantage, EGRSD's at l = 1.

    Args:
        log_prob_ratio: u; RLRT (arXiv 2605.10781) takes -u, on right rollouts alone.
        advantage: of the same shape, or one that spreads to it.
        bound: e, >= 0; up to 1 no sign is turned.
        strength: l, in [0, 1].
    """
    evidence = torch.exp(torch.sign(advantage) * log_prob_ratio).clamp(1 - bound, 1 + bound)
    return (1 - strength + strength * evidence).detach()


def control_variate_advantage(log_prob_ratio: torch.Tensor, reverse_kl: torch.Tensor) -> torch.Tensor:
    """u + KL(q || p), detached (vOPD, arXiv 2605.07865): its mean under the student is 0, position by position.

    Over a set of tokens whose sides are renormalised the mean is not 0, but the expected gradient stays that of KL(q || p): what
    does not depend on the sampled token has none. The variance falls where no token dominates, not always.
    """
    return (log_prob_ratio + reverse_kl).detach()


def floored_log_ratio(log_prob_ratio: torch.Tensor, *, share: float) -> torch.Tensor:
    """max(u, log(l / (1 - l))) (vOPD's code, arXiv 2605.07865): no token is pushed away harder than that.

    Args:
        log_prob_ratio: u.
        share: l, in (0, 1).
    """
    return log_prob_ratio.clamp(min=math.log(share / (1 - share)))


def relative_ratio(log_prob_ratio: torch.Tensor, mask: torch.Tensor, *, least: float = 0.01) -> torch.Tensor:
    """u over the mean |u| of its rollout, both (B, T), so that 1 is a typical token; 0 outside the mask.

    DASD (arXiv 2605.22263) reads a normalised ratio; that it is this one is our reading. So is `least`: without it, a teacher
    that agrees up to rounding would have its roundings magnified to the size of a typical token.

    Args:
        log_prob_ratio: u, in nats.
        mask: nonzero where a token is valid.
        least: smallest mean that is divided by, in nats, > 0; 0.01 is about what bfloat16 rounds.
    """
    ratio = torch.where(mask != 0, log_prob_ratio, 0.0)
    mean = ratio.abs().sum(-1, keepdim=True) / (mask != 0).sum(-1, keepdim=True).clamp(min=1)
    return ratio / mean.clamp(min=least)


def entropy_direction(
    student_entropy: torch.Tensor, ratio: torch.Tensor, mask: torch.Tensor, *, quantile: float = 0.2
) -> torch.Tensor:
    """omega = tanh((tau - H) / sigma) sigmoid(|d| - 1), in (-1, 1) (DASD, arXiv 2605.22263).

    It pulls to the teacher where the student is surer than tau, the quantile of H in its rollout counted from below, and
    pushes away elsewhere: with the paper's 0.2 the surest fifth is pulled.

    Args:
        student_entropy: (B, T) H.
        ratio: (B, T) d of `relative_ratio`.
        mask: (B, T), nonzero where a token is valid: the others count for nothing and get 0.
        quantile: in [0, 1].
    """
    valid = mask != 0
    entropy = torch.where(valid, student_entropy, torch.nan)
    threshold = entropy.nanquantile(quantile, dim=-1, keepdim=True)
    deviation = (entropy - entropy.nanmean(-1, keepdim=True)).abs().nanmean(-1, keepdim=True)
    direction = torch.tanh((threshold - entropy) / deviation) * torch.sigmoid(ratio.abs() - 1)
    return torch.where(valid & (deviation > 0), direction, 0.0)


def mixed_likelihood(log_prob: torch.Tensor, other_log_prob: torch.Tensor, *, share: float) -> torch.Tensor:
    """p^(1 - a) p'^a, detached, in the shape of both: what SORT (arXiv 2605.11505) weighs a token of a reference with.

    Args:
        log_prob: log p.
        other_log_prob: log p'.
        share: a, in [0, 1].
    """
    return ((1 - share) * log_prob + share * other_log_prob).exp().detach()


def critical_weight(top_entropy: torch.Tensor, log_prob: torch.Tensor, mask: torch.Tensor, *, k: int) -> torch.Tensor:
    """w_T w_S over its mean in the rollout, detached: w_T = 1 - H_k / log k, w_S = 1 - q(y) (MSD, arXiv 2605.02971).

    It is large where the teacher is sure and the student was not. That w_T is this function of the entropy, and that weights have
    mean 1, is our reading.

    Args:
        top_entropy: (B, T) entropy in nats of the target's k likeliest tokens, renormalised.
        log_prob: (B, T) log q(y).
        mask: (B, T), nonzero where a token counts; the others get 0.
        k: >= 2.

    Returns:
        (B, T); 0 in a rollout where nothing is critical.
    """
    product = ((1 - top_entropy / math.log(k)) * -torch.expm1(log_prob)).clamp(min=0).detach()
    mean = masked_mean(product, mask).unsqueeze(-1)
    return torch.where((mask != 0) & (mean > _NOTHING), product / mean.clamp(min=_NOTHING), 0.0)


def held_then_falling(step: int, *, largest: float, hold: int, fall: int) -> float:
    """`largest` for `hold` steps, then linearly to 0 over `fall` further ones: TRACE's lambda (arXiv 2605.10194), and without a hold RLSD's."""
    return largest * min(1.0, max(0.0, 1 - (step - hold) / fall))


def frontier_weight(share: float) -> float:
    """4 p (1 - p) of the share p of right rollouts, in [0, 1]: 1 where right and wrong balance (SSOPD, arXiv 2605.17497)."""
    return 4 * share * (1 - share)


def teacher_polarity(
    log_prob_ratio: torch.Tensor, mask: torch.Tensor, right: torch.Tensor, *, bound: float, threshold: float
) -> torch.Tensor:
    """o sign(s), detached, in {-1, 0, 1}: whether a teacher is followed or fled from on a rollout (SGSD, arXiv 2605.28791).

    s is the mean of clip(u, -bound, bound) over the rollout's tokens, 0 where its size is at most `threshold`; o is 1 for a
    right rollout and -1 for a wrong one.

    Args:
        log_prob_ratio: (..., B, T) u.
        mask: (B, T), nonzero where a token counts.
        right: (B,) bool.
        bound: in nats, > 0.
        threshold: in nats, >= 0.

    Returns:
        (..., B).
    """
    support = masked_mean(log_prob_ratio.detach().clamp(-bound, bound), mask)
    opinion = support.sign() * (support.abs() > threshold)
    return opinion * torch.where(right, 1.0, -1.0)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the last dimension of `values` (..., T) where `mask` is nonzero; 0 where it is nowhere."""
    return values.masked_fill(mask == 0, 0.0).sum(-1) / (mask != 0).sum(-1).clamp(min=1)


def outcome_weights(num_right: int, num_wrong: int) -> tuple[float, float]:
    """Weights 1 - s of a right and s of a wrong rollout over their mean in the batch (RESD, arXiv 2605.12741).

    s is the share of right ones, kept within 1 / B and 1 - 1 / B for B rollouts. Both are 1 where half are right, and where all
    have one outcome; the rarer outcome weighs more, and both outcomes together the same.

    Args:
        num_right, num_wrong: rollouts of the batch, over all ranks.
    """
    size = num_right + num_wrong
    if not num_right or not num_wrong:
        return 1.0, 1.0
    share = num_right / size
    mean = (num_right * (1 - share) + num_wrong * share) / size
    return (1 - share) / mean, share / mean


def brevity_reward(right: torch.Tensor, length: torch.Tensor, *, longest: float, bonus: float) -> torch.Tensor:
    """1[right] (1 + b (1 - length / longest)), float64, in the shape of both (EGRSD, arXiv 2605.13255).

    Args:
        right: bool.
        length: tokens of the rollout, in [0, longest].
        longest: tokens that a rollout may have, > 0.
        bonus: b, >= 0.
    """
    return right.double() * (1 + bonus * (1 - length.double() / longest))


def sampled_divergence(log_prob: torch.Tensor, view_log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(n,) log q(y) - log p_k(y), averaged over K views by the size of their weights; 0 where all weights are.

    Its mean over the student's own tokens is that of KL(q || p_k).

    Args:
        log_prob: (n,) log q(y).
        view_log_probs: (K, n) log p_k(y).
        weights: (K, n).
    """
    return (view_shares(weights) * (log_prob - view_log_probs)).sum(0)


def view_shares(weights: torch.Tensor) -> torch.Tensor:
    """(K, ...) sizes of the weights over their sum; 0 where all are."""
    sizes = weights.abs()
    return sizes / sizes.sum(0).clamp(min=torch.finfo(sizes.dtype).tiny)
