# SPDX-License-Identifier: Apache-2.0
"""Value, diagnostics and gradient of a divergence for a block of positions in one sweep, without autograd.

With g the derivative of the kept terms with respect to log q, the derivative with respect to the student's
logits is g - q sum(g). Adding a multiple c q to g leaves that unchanged; c is chosen so that g + c q is
exactly 0, entry by entry, where the two distributions are equal. A term that is clipped has g = 0, so there
only c q remains.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from .divergences import Divergence, compared, top_entropy
from .forms import FORMS, Block
from .support import Places

# Nats that only `LOWEST_BIAS` on one side alone can give: a token that one distribution has and the other cannot have.
_INFINITE = 1e15


class FusedDiagnostics(NamedTuple):
    """What every position contributed; all detached, (N,), 0 where the token weight is 0.

    Attributes:
        loss: divergence after the clip, in nats, before the token weight.
        unclipped: the divergence itself, in nats, >= 0 up to rounding where the target has no floor.
        clipped_share: share of vocabulary entries whose term was cut, in [0, 1]; under a support of its k slots, 2k for a
            union, and the bucket; for the `token` clip 1 where the summed value was cut.
        student_entropy: in nats, at the temperature of the loss.
        target_entropy: in nats, at the temperature of the loss.
        top_agreement: 1 where the target's likeliest token is a likeliest one of the student, else 0.
        log_prob_ratio: log p(y) - log q(y) of the sampled token under target and student, in nats; 0 where no token ids
            were given.
        weight: what `weight_of` made of the facts, of any sign, 1 without it; in a loss of facts its derivative with
            respect to the divergence.
    """

    loss: torch.Tensor
    unclipped: torch.Tensor
    clipped_share: torch.Tensor
    student_entropy: torch.Tensor
    target_entropy: torch.Tensor
    top_agreement: torch.Tensor
    log_prob_ratio: torch.Tensor
    weight: torch.Tensor


class Row(IntEnum):
    """Rows of what a sweep returns: the first six of [`FusedDiagnostics`], two where token ids are given, one more on request."""

    CLIPPED = 0
    UNCLIPPED = 1
    CLIPPED_SHARE = 2
    STUDENT_ENTROPY = 3
    TARGET_ENTROPY = 4
    TOP_AGREEMENT = 5
    LOG_PROB = 6
    TARGET_LOG_PROB = 7
    TARGET_TOP_ENTROPY = 8


def num_rows(rule: Divergence, *, samples: bool, has_target: bool) -> int:
    """Rows that a sweep returns: with sampled tokens (`samples`) or without, of a target or of none."""
    if not samples:
        return Row.LOG_PROB
    return len(Row) if has_target and rule.entropy_top_k is not None else Row.TARGET_TOP_ENTROPY


def sweep(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rule: Divergence,
    token_ids: torch.Tensor | None = None,
    *,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Diagnostics and gradient of a block of positions.

    Args:
        student_logits: (n, V), finite, already divided by the temperature.
        target_logits: (n, V), finite, already divided by the temperature.
        rule: the divergence and its clip; its temperature is not read.
        token_ids: (n,) int64 sampled tokens, if their log-probabilities are wanted.
        with_gradient: False leaves the gradient out.

    Returns:
        (6, n) of [`Row`], or (8, n) with token ids, (9, n) where the rule asks for `entropy_top_k` too, and (n, V) derivative of each position's loss with
        respect to `student_logits`, or None.
    """
    log_q, log_p = student_logits.log_softmax(-1), target_logits.log_softmax(-1)
    whole = Block(log_q, log_p, log_q.exp(), log_p.exp())
    block, places = _compared(whole, rule, token_ids)
    values, slope, kept = _clipped(block, rule, with_gradient)
    sampled = [] if token_ids is None else [_at(log, token_ids) for log in (log_q, log_p)]
    if sampled and rule.entropy_top_k is not None:
        sampled.append(top_entropy(log_p, rule.entropy_top_k))
    diagnostics = torch.stack([*values, *_distribution_measures(whole), *sampled])
    if not with_gradient:
        return diagnostics, None
    if places is None:
        gradient = slope.addcmul(block.q, slope.sum(-1, keepdim=True), value=-1)
    else:
        gradient = rule.support.spread(slope, block.q, whole.q, places)
    return diagnostics, gradient if kept is None else gradient.mul_(kept.unsqueeze(-1))


def finished(stats: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(8, n) of [`FusedDiagnostics`] from what the sweeps returned and the weights (n,)."""
    samples = len(stats) > Row.LOG_PROB
    ratio = stats[Row.TARGET_LOG_PROB] - stats[Row.LOG_PROB] if samples else torch.zeros_like(weight)
    diagnostics = torch.cat([stats[: Row.LOG_PROB], torch.stack([ratio, weight])])
    diagnostics.masked_fill_(diagnostics < -_INFINITE, -torch.inf)
    return diagnostics.masked_fill_(diagnostics > _INFINITE, torch.inf)


def sweep_sampled(student_logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """What [`sweep`] returns (8, n) where there is no target: 0 but for the student's own, and a log-ratio of 0."""
    log_q = student_logits.log_softmax(-1)
    rows = student_logits.new_zeros(Row.TARGET_TOP_ENTROPY, len(log_q))
    rows[Row.STUDENT_ENTROPY] = -(log_q.exp() * log_q).sum(-1)
    rows[Row.LOG_PROB] = rows[Row.TARGET_LOG_PROB] = _at(log_q, token_ids)
    return rows


def sampled_gradient(student_logits: torch.Tensor, token_ids: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """(n, V) derivative of `slope` (n,) times the log-probabilities of `token_ids` (n,): slope (1[v = y] - q_v)."""
    slope = slope.unsqueeze(-1)
    return student_logits.softmax(-1).mul_(-slope).scatter_add_(-1, token_ids.unsqueeze(-1), slope)


def _at(log_prob: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return log_prob.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _compared(block: Block, rule: Divergence, token_ids: torch.Tensor | None) -> tuple[Block, Places | None]:
    """What the rule compares: the block's entries on its support, under its floors."""
    log_q, log_p, places = compared(*block, rule, token_ids)
    if places is None:
        return block if log_p is block.log_p else block._replace(log_p=log_p, p=log_p.exp()), None
    return Block(log_q, log_p, log_q.exp(), log_p.exp()), places


def _clipped(block: Block, rule: Divergence, with_gradient: bool) -> tuple[tuple, torch.Tensor, torch.Tensor | None]:
    """(loss, unclipped, clipped share), each (n,); the slope (n, V); for the `token` clip which positions (n,) keep theirs."""
    terms, slope, multiple = FORMS[rule.name].slope(block, rule.mixture_weight)
    unclipped = terms.sum(-1)
    if rule.clip is None:
        return (unclipped, unclipped, torch.zeros_like(unclipped)), slope, None
    if rule.clip == "token":
        kept = unclipped <= rule.clip_value
        return (unclipped.clamp(max=rule.clip_value), unclipped, (~kept).to(unclipped.dtype)), slope, kept
    clipped = terms > rule.clip_value if rule.clip == "upper" else terms.abs() > rule.clip_value
    clipped_share = clipped.to(unclipped.dtype).mean(-1)
    if with_gradient:
        slope = torch.where(clipped, block.q * multiple, slope)
    lowest = None if rule.clip == "upper" else -rule.clip_value
    return (terms.clamp_(lowest, rule.clip_value).sum(-1), unclipped, clipped_share), slope, None


def _distribution_measures(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student_entropy = -(block.q * block.log_q).sum(-1)
    target_entropy = -(block.p * block.log_p).sum(-1)
    # The student's highest value stands at the target's top token: on a CPU `argmax` costs twelve times `amax`.
    agreement = block.log_q.gather(-1, block.log_p.argmax(-1, keepdim=True)).squeeze(-1) == block.log_q.amax(-1)
    return student_entropy, target_entropy, agreement.to(student_entropy.dtype)
