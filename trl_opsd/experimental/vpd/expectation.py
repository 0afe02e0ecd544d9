# SPDX-License-Identifier: Apache-2.0
"""Which steps of VPD are E-steps, what its teacher thinks of a whole rollout, and the threshold of that (arXiv 2605.15113)."""

from collections.abc import Mapping
from typing import Any

import torch

from ...losses import sequence_log_ratio
from ...methods.base import RowFacts, Seen
from ...methods.groups import split_by_reward


def is_expectation(step: int, settings: Any) -> bool:
    """Whether an optimizer step is an E-step: every (F + 1)-th is."""
    between = settings.maximization_steps
    return between is not None and (step + 1) % (between + 1) == 0


def sequence_reward(facts: RowFacts, settings: Any) -> torch.Tensor:
    """(B,) r = beta (log T(y) - log S(y)), whose gradient goes to T alone.

    Args:
        facts: of rollouts under the bare prompt, and in `extra` of the same tokens under the teacher's.
        settings: reads `reward_beta`.
    """
    taught, bare = (sequence_log_ratio(own.log_prob, 0.0, own.given["mask"]) for own in (facts.extra, facts))
    return settings.reward_beta * (taught - bare.detach())


def running_midpoint(memory: Mapping[str, Any], seen: Seen, settings: Any) -> Mapping[str, Any]:
    """delta after the E-step of a generation batch that has right and wrong rollouts; else as it was."""
    judged = [
        (rollout, settings.reward_beta * (numbers[0].sum() - numbers[1].sum()).item())
        for rollout, numbers in zip(seen.rollouts, seen.view_log_probs, strict=True)
        if len(numbers) == 2
    ]
    right, wrong = split_by_reward([rollout for rollout, _ in judged], settings.reward_threshold)
    if not right or not wrong:
        return memory
    means = [sum(judged[place][1] for place in places) / len(places) for places in (right, wrong)]
    midpoint, share = sum(means) / 2, settings.midpoint_momentum
    before = memory.get("midpoint")
    return {"midpoint": midpoint if before is None else share * before + (1 - share) * midpoint}
