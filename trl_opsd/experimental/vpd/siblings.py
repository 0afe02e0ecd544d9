# SPDX-License-Identifier: Apache-2.0
"""VPD's parts: which step is an E-step, which siblings the teacher reads, and what it thinks of a rollout (arXiv 2605.15113)."""

from collections.abc import Sequence
from typing import Any

import torch

from ...methods.base import RowFacts
from ...methods.groups import split_by_reward
from ...methods.peers import block, shown_text
from ...teacher.contexts import Rollout


def is_expectation(step: int, settings: Any) -> bool:
    """Whether an optimizer step is an E-step: every (F + 1)-th is."""
    between = settings.maximization_steps
    return between is not None and (step + 1) % (between + 1) == 0


def shown_blocks(group: Sequence[Rollout], index: int, settings: Any) -> str:
    """The first right sibling and, where it is to be contrasted, the first wrong one; feedback as SDPO shows it."""
    right, wrong = (
        next((shown_text(group[other].completion, settings) for other in places if other != index), None)
        for places in split_by_reward(group, settings.reward_threshold)
    )
    blocks = block(settings.peer_block, right)
    if settings.show_wrong_sibling:
        blocks += block(settings.wrong_block, wrong)
    if right is None or settings.feedback_beside_peer:
        blocks += block(settings.feedback_block, group[index].note)
    return blocks


def sequence_reward(facts: RowFacts, settings: Any) -> torch.Tensor:
    """(B,) r = beta (log T(y) - log S(y)), whose gradient goes to T alone.

    Args:
        facts: of rollouts under the bare prompt, and in `extra` of the same tokens under the teacher's.
        settings: reads `reward_beta`.
    """
    taught, bare = (own.log_prob.masked_fill(own.given["mask"] == 0, 0.0).sum(-1) for own in (facts.extra, facts))
    return settings.reward_beta * (taught - bare.detach())
