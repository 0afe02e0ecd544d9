# SPDX-License-Identifier: Apache-2.0
"""SSOPD: the shortest right rollout of a group teaches its longest wrong one, beside GRPO (arXiv 2605.17497).

With p the share of right rollouts of a group, y+ its shortest right and y- its longest wrong one,

    loss = GRPO + lambda_0 4 p (1 - p) mean over the first K tokens of y- of KL(teacher || student)

where the frozen teacher reads question and y+. The weight is largest where right and wrong balance. A group that is all right or
all wrong is left to GRPO, and so is every other rollout of a group: one teacher forward serves a group.

Differences to the paper, whose code is announced: K = 1,024, the clip of each term at 0.05, that ties go to the first and that y+ is
shown with its thinking are ours, and so is that the mean is over all groups of a step, those without the term too. A
rollout without a reward is neither right nor wrong.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...losses import frontier_weight, masked_mean
from ...methods.base import Method, RowFacts
from ...methods.groups import group_label, split_by_reward
from ...methods.papers import arxiv_paper
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused


def contrast_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """For the longest wrong rollout, the shortest right one; nothing for any other.

    Args:
        group: the rollouts of one prompt, with rewards.
        settings: reads `reward_threshold`.
        moment: not read.
    """
    right, wrong = split_by_reward(group, settings.reward_threshold)
    if not right or not wrong:
        return [Unused("group not mixed")] * len(group)
    shortest = group[min(right, key=lambda index: group[index].num_tokens)]
    taught = max(wrong, key=lambda index: group[index].num_tokens)
    view = TeacherContext("teacher", shortest.completion, anchor=1.0)
    return [(view,) if index == taught else Unused("not longest wrong") for index in range(len(group))]


def frontier_marks(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[float]:
    """4 p (1 - p) times the group's size: a group has one rollout with the term, and the mean is over all rollouts."""
    right, wrong = split_by_reward(group, settings.reward_threshold)
    share = len(right) / max(1, len(right) + len(wrong))
    return [len(group) * frontier_weight(share)] * len(group)


def contrast_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B,) lambda_0 times the mark times the mean of the divergence over the distilled tokens, 0 where none are."""
    mark = facts.given["mark"][:, 0]
    return settings.frontier_strength * mark * masked_mean(facts.clipped_divergence, facts.given["mask"])


SSOPD = Method(
    name="SSOPD",
    contexts=contrast_contexts,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    marks=frontier_marks,
    loss=contrast_loss,
    averages_all=True,
    inferred="The length K, the clip, ties, and that the mean is over all groups of a step are inferred.",
    paper=arxiv_paper(
        "Self-Supervised On-Policy Distillation for Reasoning Language Models",
        "2605.17497",
        "hong2026ssopd",
        "Yinrong Hong and Zhiquan Tan",
    ),
)
