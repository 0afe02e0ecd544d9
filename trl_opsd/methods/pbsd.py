# SPDX-License-Identifier: Apache-2.0
"""PBSD: what the model writes to the privileged prompt is preferred to its rollout (arXiv 2605.05040).

y+ answers the teacher's prompt, which shows the solution, and y- the bare one. With r(y) = log q(y | x) - log p(y | x, s), a
sum over the sequence under student and frozen teacher, the loss of a pair is -log sigmoid(beta (r(y+) - r(y-))): DPO whose
reference reads more than the policy does.

Differences to the paper, whose text we know through notes: under vLLM y+ is written by the student's weights of now, where it is
the teacher that speaks there; beta, the learning rate and which copy the teacher is were not found, so 0.1, OPSD's and the
initial weights are ours. No pair is filtered by whether its answers are right, as far as we know there neither.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..losses import preference_loss, sequence_log_ratio
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from .base import Extra, Method, RowFacts
from .papers import arxiv_paper


def privileged_prompt(rollout: Rollout, settings: Any) -> TeacherContext:
    """The prompt that y+ answers, and under which the teacher reads both sequences."""
    return TeacherContext("teacher", rollout.shown_solution, read=1.0)


def judged_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads y- under the privileged prompt."""
    return [(privileged_prompt(rollout, settings),) for rollout in group]


def preferred_sequences(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Extra | None]:
    """y+ as it was sampled, which the teacher reads likewise."""
    return [Extra(rollout.written.ids, (privileged_prompt(rollout, settings),)) for rollout in group]


def pair_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B,) loss of each pair.

    Args:
        facts: of y- (B, D), and in `extra` of y+ (B, E), with one view each.
        settings: reads `preference_beta`.
        moment: not read.
    """
    return preference_loss(settings.preference_beta * (_relative(facts.extra) - _relative(facts)))


def _relative(facts: RowFacts) -> torch.Tensor:
    """(B,) log q(y) - log p(y) of whole sequences."""
    return sequence_log_ratio(facts.log_prob, facts.given["view_log_probs"][0], facts.given["mask"])


PBSD = Method(
    name="PBSD",
    contexts=judged_contexts,
    asks=privileged_prompt,
    extras=preferred_sequences,
    loss=pair_loss,
    has_target=False,
    reads_views=True,
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper(
        "Preference-Based Self-Distillation: Beyond KL Matching via Reward Regularization",
        "2605.05040",
        "pbsd2026",
        "Xin Yu and Liuchen Liao and Yiwen Zhang and Yingchen Yu and Lingzhou Xue and Qinzhen Guo",
    ),
)
