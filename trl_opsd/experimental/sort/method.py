# SPDX-License-Identifier: Apache-2.0
"""SORT: where every rollout of a prompt is wrong, the reference solution is learnt beside GRPO (arXiv 2605.11505).

With p = q(y*_t | x) the student's probability of a token of the solution, and p' = q(y*_t | x, plan) where a plan is shown,

    L = GRPO + eta mean_t w_t (-log q(y*_t | x)),    w_t = p^(1 - a) p'^a, held constant:

learning by heart, weighed by how likely the token is already, and by how much the plan explains it. Groups with a right
rollout are left to GRPO. The plan is written once, from the solution, into the column `plan`.

The paper was read as an abstract and a summary only: the weight, a = 1/2 and eta = 0.1 are ours, and so is the mean, which is
over the repaired groups of a step whatever their number. The solution must have the form of a completion: text in the
assistant's turn, to which the end token is added.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...losses import masked_mean, mixed_likelihood
from ...methods.base import Extra, Method, RowFacts, prompt_templates
from ...methods.groups import group_label, split_by_reward
from ...methods.papers import arxiv_paper
from ...rows.texts import is_missing
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext


def no_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads no rollout."""
    return [()] * len(group)


def references(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Extra | None]:
    """The solution beside the first rollout of a group that is all wrong, read where the plan is shown."""
    right, wrong = split_by_reward(group, settings.reward_threshold)
    solution, plan = group[0].solution, group[0].columns.get("plan")
    repaired = not right and len(wrong) == len(group) and not is_missing(solution) and not is_missing(plan)
    view = TeacherContext("plan", None, texts=(("plan", plan),), read=1.0)
    return [Extra(solution, (view,)) if repaired else None, *[None] * (len(group) - 1)]


def repair_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B,) eta mean_t w_t (-log q(y*_t)) of each reference, 0 where there is none.

    Args:
        facts: in `extra` of the references (B, E), with one view.
        settings: reads `repair_weight` and `plan_share`.
        moment: not read.
    """
    given, own = facts.extra.given, facts.extra.log_prob
    weight = mixed_likelihood(own, given["view_log_probs"][0], share=settings.plan_share)
    return settings.repair_weight * masked_mean(-weight * own, given["mask"])


SORT = Method(
    name="SORT",
    contexts=no_contexts,
    extras=references,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    loss=repair_loss,
    has_target=False,
    reads_views=True,
    templates=prompt_templates("plan"),
    needs_columns=("plan",),
    inferred="The paper was read as an abstract and a summary: the share a and the factor eta, the mean over repaired groups and all "
    "settings of training are inferred.",
    columns=("plan",),
    paper=arxiv_paper("Selective Off-Policy Reference Tuning with Plan Guidance", "2605.11505", "sort2026"),
)
