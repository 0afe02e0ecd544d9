# SPDX-License-Identifier: Apache-2.0
"""RLRT: reward the tokens of right rollouts that the teacher did not expect (arXiv 2605.10781).

    right:  A_t = A [(1 - l) + l clip(exp(-sign(A) u), 1 - e, 1 + e)],  u = log teacher(y_t) - log student(y_t)
    wrong:  A_t = A

in GRPO's clipped loss, with the weight held constant. It is RLSD with student and teacher exchanged, on right rollouts alone. The
teacher is the live student that reads a right peer: a random one other than the rollout itself. A right rollout without
such a peer keeps A. u is taken under the weights that sampled, as advantages are.

The official code is only promised; the formula was read through notes. l, whose weights the teacher has, which peer it reads and
that no rollout reads itself are ours.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..losses import evidence_weight
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method, RowFacts
from .groups import group_label, is_right, right_peers
from .papers import arxiv_paper
from .rlsd import strength_at, surprise


def peers_of_right_rollouts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view that is read for each right rollout: a random other right one.

    Args:
        group: the rollouts of one prompt, with rewards.
        settings: reads `reward_threshold` and `max_rollout_context_length`.
        moment: its `draw` picks the peer.
    """
    peers = right_peers(group, settings.reward_threshold)
    return [_view(rollout, own, settings, moment) for rollout, own in zip(group, peers, strict=True)]


def _view(rollout: Rollout, peers: Sequence[str], settings: Any, moment: Moment) -> Contexts:
    if not is_right(rollout, settings.reward_threshold):
        return Unused("not right")
    if not peers:
        return Unused("no right peer")
    return (TeacherContext("teacher", moment.draw.choice(peers), settings.max_rollout_context_length, read=1.0),)


def surprising_advantage(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """A_t of right rollouts, (B, D); the others have no view, and keep A."""
    advantage, strength = facts.given["advantage"], strength_at(settings, moment.step)
    weight = evidence_weight(-surprise(facts), advantage, bound=settings.evidence_bound, strength=strength)
    return advantage * facts.keep("evidence weight", weight)


RLRT = Method(
    name="RLRT",
    contexts=peers_of_right_rollouts,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    advantages=surprising_advantage,
    has_target=False,
    reads_views=True,
    reads_old=True,
    paper=arxiv_paper(
        "Rebellious Student: Reversing Teacher Signals for Reasoning Exploration with Self-Distilled RLVR",
        "2605.10781",
        "kim2026rebellious",
        "Jeonghye Kim and Jiwon Jeon and Dongsheng Li and Yuqing Yang",
    ),
)
