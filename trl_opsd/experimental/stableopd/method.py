# SPDX-License-Identifier: Apache-2.0
"""StableOPD: distillation by the sampled token, held by the reference solution and by the initial student (arXiv 2604.08527).

    loss = - mean_t u r log student(y_t) + l_g mean_t (-log student(s_t)) + b mean_t KL(student || first)(y_<t)

with u = log teacher(y_t) - log student(y_t) held constant and r the ratio to the policy that sampled, under PPO's clip; s is the
solution, which joins the rollouts of its prompt once, and `first` the student as it was at the start. Without the two weights this
is plain distillation of the sampled token, which the paper sees collapse: rollouts grow until they are cut, and repeat.

Differences to the paper: its teacher is another model, here it is the model that has read the solution. l_g = 0.1 and b = 0.01 are
from a re-implementation. That each mean is over all tokens of its kind in a step, whatever their number, is ours, and so is
that the solution is learnt as text of the assistant's turn, to which the end token is added.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...methods.base import Extra, Method, RowFacts, Term
from ...methods.groups import policy_gradient
from ...methods.opsd import solution_read
from ...methods.papers import arxiv_paper
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext


def held_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads the solution; the initial student, where its weight is not 0, the bare prompt: it is the target."""
    first = TeacherContext("plain", None, anchor=1.0, weights="base")
    held = (first,) if settings.reference_weight else ()
    return [(*views, *held) for views in solution_read(group, settings, moment)]


def golden_rollouts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Extra | None]:
    """The solution beside the first rollout of a prompt, where its weight is not 0."""
    golden = Extra(group[0].solution) if settings.golden_weight else None
    return [golden, *[None] * (len(group) - 1)]


def held_policy_gradient(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """-u r log student(y_t) + b KL(student || first), (B, D)."""
    advantage = (facts.given["view_log_probs"][0] - facts.log_prob).detach()
    return policy_gradient(facts, advantage, settings) + settings.reference_weight * facts.divergence


def unlikelihood(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """-log student(s_t) of the solutions, (B, E)."""
    return -facts.log_prob


STABLE_OPD = Method(
    name="StableOPD",
    contexts=held_contexts,
    contexts_from_rows=True,
    needs_group=True,
    extras=golden_rollouts,
    extra_term=Term(weight=lambda settings: settings.golden_weight, loss=unlikelihood),
    loss=held_policy_gradient,
    reads_views=True,
    reads_old=True,
    owners=lambda settings: ("base",),
    target_owner="base",
    target_is_reference=True,
    inferred="The weights l_g and b are from a re-implementation, and that each mean is over all tokens of its kind in a step is "
    "inferred; the paper's teacher is another model.",
    paper=arxiv_paper(
        "Demystifying OPD: Length Inflation and Stabilization Strategies for Large Language Models",
        "2604.08527",
        "luo2026demystifying",
        "Feng Luo and Yu-Neng Chuang and Guanchu Wang and Zicheng Xu and Xiaotian Han and Tianyi Zhang and Vladimir Braverman",
    ),
)
