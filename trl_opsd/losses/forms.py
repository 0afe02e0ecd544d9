# SPDX-License-Identifier: Apache-2.0
"""Every divergence as one entry of one table: its terms, and its slope in closed form.

q is the student, p the frozen target, m = w p + (1 - w) q their mixture with the weight w of the target. A new
divergence is an entry of `FORMS`; settings, clips, the dense and the fused loss and the tests take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Beyond this log-ratio the smaller of the two probabilities is under exp(-80): its term is below 1e-32, and
# expm1 would overflow in float32 soon after.
MAX_LOG_RATIO = 80.0


class Block(NamedTuple):
    """Log-probabilities and probabilities of some positions, each (n, V)."""

    log_q: torch.Tensor
    log_p: torch.Tensor
    q: torch.Tensor
    p: torch.Tensor


class Form(NamedTuple):
    """A divergence.

    Attributes:
        terms: from (log q, log p, w) to the terms (..., V) that sum to it, differentiable with respect to log q; a term
            is exactly 0 where log q equals log p.
        slope: from (block, w) to the terms (n, V), to g + c q (n, V), where g is the derivative of the terms with
            respect to log q, and to c, the multiple of q for which g + c q is exactly 0 where q equals p.
    """

    terms: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    slope: Callable[[Block, float], tuple[torch.Tensor, torch.Tensor, float]]


def _forward_kl(log_q, log_p, weight):
    p = log_p.exp()
    return p * (log_p - log_q).masked_fill(p == 0, 0.0)


def _forward_kl_slope(block, weight):
    terms = (block.log_p - block.log_q).mul_(block.p)
    return terms, block.q - block.p, 1.0


def _reverse_kl(log_q, log_p, weight):
    q = log_q.exp()
    return q * (log_q - log_p).masked_fill(q == 0, 0.0)


def _reverse_kl_slope(block, weight):
    terms = (block.log_q - block.log_p).mul_(block.q)
    return terms, terms.clone(), -1.0


# Each compared token has the constant reward w log(p / q), with w the student's probability among them, and the loss is
# minus the sum of the rewards: d/dlog q is the term itself. Where the student is a distribution over them, it is reverse KL.


def _policy_reverse_kl(log_q, log_p, weight):
    held = log_q.detach()
    impossible = held.exp() == 0
    reward = held.softmax(-1) * (held - log_p).masked_fill(impossible, 0.0)
    return reward * (1 + (log_q - held).masked_fill(impossible, 0.0))


def _policy_reverse_kl_slope(block, weight):
    terms = (block.log_q - block.log_p).mul_(block.log_q.softmax(-1))
    return terms, terms.clone(), 0.0


# With r = log p - log q: log(m / q) = log(1 + w (e^r - 1)) and log(m / p) = log(1 + (1 - w) (e^-r - 1)).


def _jsd(log_q, log_p, weight):
    skewed_forward, skewed_reverse = _skewed_forward_kl(log_q, log_p, weight), _skewed_reverse_kl(log_q, log_p, weight)
    return weight * skewed_forward + (1 - weight) * skewed_reverse


def _jsd_slope(block, weight):
    log_p_over_m, log_m_over_q = _log_ratios_to_mixture(block, weight)
    slope = log_m_over_q.mul_(block.q).mul_(weight - 1)
    return log_p_over_m.mul_(block.p).mul_(weight).add_(slope), slope, 0.0


def _skewed_forward_kl(log_q, log_p, weight):
    ratio = _bounded_ratio(log_q, log_p)
    return -log_p.exp() * torch.log1p((1 - weight) * torch.expm1(-ratio))


def _skewed_forward_kl_slope(block, weight):
    log_p_over_m, _ = _log_ratios_to_mixture(block, weight)
    slope = torch.expm1(log_p_over_m).mul_(block.q).mul_(weight - 1)  # g = -(1 - w) q p / m
    return log_p_over_m.mul_(block.p), slope, 1.0 - weight


def _skewed_reverse_kl(log_q, log_p, weight):
    return -log_q.exp() * torch.log1p(weight * torch.expm1(_bounded_ratio(log_q, log_p)))


def _skewed_reverse_kl_slope(block, weight):
    _, log_m_over_q = _log_ratios_to_mixture(block, weight)
    slope = torch.expm1(-log_m_over_q).mul_(weight - 1)  # g = q (log(q / m) + 1 - (1 - w) q / m)
    terms = log_m_over_q.neg_()
    return terms.mul(block.q), slope.add_(terms).mul_(block.q), -weight


def _bounded_ratio(log_q, log_p):
    ratio = (log_p - log_q).masked_fill(log_p == log_q, 0.0)  # of two -inf too
    return ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log_ratios_to_mixture(block, weight):
    ratio = (block.log_p - block.log_q).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_q = torch.expm1(ratio).mul_(weight).log1p_()
    return ratio.sub_(log_m_over_q), log_m_over_q


FORMS = {
    "forward_kl": Form(_forward_kl, _forward_kl_slope),  # KL(p || q)
    "reverse_kl": Form(_reverse_kl, _reverse_kl_slope),  # KL(q || p)
    # Minus the rewards of tokens in a policy gradient (Rethinking OPD, arXiv 2604.13016).
    "policy_reverse_kl": Form(_policy_reverse_kl, _policy_reverse_kl_slope),
    "jsd": Form(_jsd, _jsd_slope),  # w KL(p || m) + (1 - w) KL(q || m)
    # Skewed towards the student's own mass, so that no ratio is unbounded (DistiLLM, arXiv 2402.03898).
    "skewed_forward_kl": Form(_skewed_forward_kl, _skewed_forward_kl_slope),  # KL(p || m)
    "skewed_reverse_kl": Form(_skewed_reverse_kl, _skewed_reverse_kl_slope),  # KL(q || m)
}
