# SPDX-License-Identifier: Apache-2.0
"""What pages share: which rollouts are right, the kind of a group, the ratio to the policy that sampled."""

from collections.abc import Sequence
from typing import Any

import torch

from ..losses import Facts, clipped_ratio, importance_weight, policy_loss
from ..rows.texts import is_missing
from ..teacher.contexts import Moment, Rollout


def split_by_reward(group: Sequence[Rollout], threshold: float) -> tuple[list[int], list[int]]:
    """Indices of the right and of the wrong rollouts; one without a reward is neither."""
    scored = [(index, rollout.reward) for index, rollout in enumerate(group) if rollout.reward is not None]
    return [i for i, reward in scored if reward >= threshold], [i for i, reward in scored if reward < threshold]


def right_peers(group: Sequence[Rollout], threshold: float) -> list[list[str]]:
    """Of each rollout the texts of the other right ones, in their order."""
    right, _ = split_by_reward(group, threshold)
    return [[group[peer].completion for peer in right if peer != index] for index in range(len(group))]


def is_right(rollout: Rollout, threshold: float) -> bool | None:
    """Whether a rollout is right; None without a reward."""
    right, wrong = split_by_reward([rollout], threshold)
    return bool(right) if right or wrong else None


def group_label(group: Sequence[Rollout], settings: Any) -> str:
    """Kind of a group: mixed, all_right, all_wrong (with a solution: usable), all_wrong_without_solution, unscored."""
    right, wrong = split_by_reward(group, settings.reward_threshold)
    if not right and not wrong:
        return "unscored"
    if not wrong:
        return "all_right"
    if right:
        return "mixed"
    without = all(is_missing(rollout.solution) for rollout in group)
    return "all_wrong_without_solution" if without else "all_wrong"


def ratio_weight(facts: Facts, settings: Any, moment: Moment) -> torch.Tensor:
    """(n,) min(q(y) / q_old(y), `importance_cap`) of the sampled token."""
    return importance_weight(facts.log_prob, facts.given["old_log_prob"], cap=settings.importance_cap)


def policy_ratio(facts: Facts, advantage: torch.Tensor, settings: Any) -> torch.Tensor:
    """PPO's cut ratio to the policy that sampled, times the weight for the engine that did; in the shape of the facts.

    Args:
        facts: of rows or flat.
        advantage: of the sampled token, in the same shape.
        settings: reads `epsilon`, `epsilon_high` and `delta`.
    """
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    bounds = {"low": settings.epsilon, "high": high, "largest": settings.delta}
    ratio = clipped_ratio(facts.log_prob, facts.given["old_log_prob"], advantage, **bounds)
    return ratio * facts.given["engine_weight"]


def policy_gradient(facts: Facts, advantage: torch.Tensor, settings: Any) -> torch.Tensor:
    """-A r log q(y) with the ratio of `policy_ratio`, in the shape of the facts."""
    return policy_loss(facts.log_prob, advantage, policy_ratio(facts, advantage, settings))
