# SPDX-License-Identifier: Apache-2.0
"""EGRSD: the reward gives the sign, the teacher's log-ratio the size, its entropy a gate (arXiv 2605.13255).

    loss = - mean A_i w g log student(y_t),  w = clip(exp(sign(A_i) u), 1 - e, 1 + e),  g = clip(1 - gamma h, 0.1, 1)

with u = log teacher(y_t) - log student(y_t) and h the teacher's entropy over the largest of the batch, or over 1 nat where
that is more. There is one rollout a prompt, so A_i is its reward put to scale by the mean and deviation of all rewards so
far; the reward is 1[right] (1 + b (1 - length / longest length)). CL-EGRSD gates by the smallest entropy of a token and the
next `lookahead_tokens`. The teacher is the frozen base that reads problem and solution: one that follows the student would
send u to 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...losses import RunningMoments, brevity_reward, entropy_gate, evidence_weight, lookahead_minimum
from ...methods.base import Method, RowFacts, Seen
from ...methods.papers import arxiv_paper
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext


def solution_read(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view that is read, of problem and solution; a rollout without a reward has none."""
    return [
        () if rollout.reward is None else (TeacherContext("teacher", rollout.shown_solution, read=1.0),)
        for rollout in group
    ]


def shaped_reward(reward: torch.Tensor, length: torch.Tensor, settings: Any) -> torch.Tensor:
    """1[right] (1 + b (1 - length / longest length)), in the shape of both; 0 for a reward of NaN."""
    right = reward.float() >= settings.reward_threshold  # as TRL keeps rewards
    return brevity_reward(right, length, longest=settings.max_completion_length, bonus=settings.brevity_bonus)


def remember_scale(memory: Mapping[str, Any], seen: Seen, settings: Any) -> dict[str, Any]:
    """Running moments of the rewards with this batch's, and the largest entropy of the teacher in it."""
    scored = [rollout for rollout in seen.rollouts if rollout.reward is not None]
    rewards = torch.tensor([rollout.reward for rollout in scored], dtype=torch.float64)
    lengths = torch.tensor([rollout.num_tokens for rollout in scored], dtype=torch.float64)
    moments = RunningMoments(*memory.get("rewards", ()))
    return {
        "rewards": list(moments.with_values(shaped_reward(rewards, lengths, settings).tolist())),
        "largest_entropy": max((h.max().item() for h in seen.view_entropies if h.numel()), default=0.0),
    }


def gated_evidence(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """-A w g log student(y_t), (B, D)."""
    given, memory = facts.given, moment.memory
    rewards = shaped_reward(given["reward"], given["length"], settings)
    advantage = facts.keep("advantage", RunningMoments(*memory.get("rewards", ())).whitened(rewards))
    entropy = given["view_entropies"][0]
    if settings.lookahead_tokens:
        entropy = lookahead_minimum(entropy, given["mask"], window=settings.lookahead_tokens)
    largest, strength = memory.get("largest_entropy", 0.0), settings.entropy_gate_strength
    gate = facts.keep("gate", entropy_gate(entropy, largest, strength=strength, floor=settings.entropy_gate_floor))
    ratio = given["view_log_probs"][0] - facts.log_prob.detach()
    weight = facts.keep("evidence weight", evidence_weight(ratio, advantage, bound=settings.evidence_bound))
    return -(advantage * weight * gate).to(facts.log_prob.dtype) * facts.log_prob


EGRSD = Method(
    name="EGRSD",
    contexts=solution_read,
    needs_reward=True,
    loss=gated_evidence,
    has_target=False,
    reads_views=True,
    remember=remember_scale,
    inferred="The bound e and the bonus b, that a batch's own rewards are among those it is put to scale by, and that the lookahead ends "
    "with the rollout are inferred: the paper as we know it does not say.",
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper(
        "Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning",
        "2605.13255",
        "ke2026egrsd",
        "Junlong Ke and Zichen Wen and Weijia Li and Conghui He and Linfeng Zhang",
    ),
)
