# SPDX-License-Identifier: Apache-2.0
"""DASD: pull sure tokens to the teacher, push unsure ones away from it (arXiv 2605.22263).

    A_t = A + beta omega d,  omega = tanh((tau - H) / sigma) sigmoid(|d| - 1),  d = u / max(mean |u|, 0.01),
    u = log teacher(y_t) - log student(y_t)

in GRPO's clipped loss, with the second term held constant. H is the student's entropy, tau the quantile rho of it in the rollout,
counted from below, and sigma its mean absolute deviation there. So with rho 0.2 the surest fifth of the tokens is pulled. The
teacher is the live student that reads problem and a verified solution: a random right peer, else the row's. A rollout
without one is trained by its advantage alone. u and d are taken under the weights that sampled, H under those of now.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...losses import entropy_direction, relative_ratio
from ...methods.base import Method, RowFacts
from ...methods.groups import group_label, split_by_reward
from ...methods.papers import arxiv_paper
from ...rows.texts import is_missing
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused


def verified_solutions(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view that is read of each rollout: a random right peer, else the row's solution.

    Args:
        group: the rollouts of one prompt, with rewards.
        settings: reads `reward_threshold` and `max_rollout_context_length`.
        moment: its `draw` picks the peer.
    """
    right, _ = split_by_reward(group, settings.reward_threshold)
    contexts: list[Contexts] = []
    for index, rollout in enumerate(group):
        peers = [group[peer].completion for peer in right if peer != index]
        text = moment.draw.choice(peers) if peers else rollout.solution
        view = TeacherContext("teacher", text, settings.max_rollout_context_length, read=1.0)
        contexts.append(Unused("no solution") if is_missing(text) else (view,))
    return contexts


def directed_advantage(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """A + beta omega d, (B, D)."""
    given = facts.given
    ratio = relative_ratio(given["view_log_probs"][0] - given["old_log_prob"], given["mask"])
    direction = entropy_direction(facts.student_entropy, ratio, given["mask"], quantile=settings.pulled_share)
    pull = settings.direction_strength * facts.keep("omega", direction) * facts.keep("relative ratio", ratio)
    return given["advantage"] + pull


DASD = Method(
    name="DASD",
    contexts=verified_solutions,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    advantages=directed_advantage,
    has_target=False,
    reads_views=True,
    reads_old=True,
    inferred=(
        "That the log-ratio is divided by its mean size in the rollout (at least 0.01 nats), beta 0.1, the live teacher, and the deviation of the "
        "entropy about its mean are inferred: the paper was read through notes, and there is no code."
    ),
    paper=arxiv_paper(
        "Tailoring Teaching to Aptitude: Direction-Adaptive Self-Distillation for LLM Reasoning",
        "2605.22263",
        "zhang2026tailoring",
        "Hongbin Zhang and Chaozheng Wang and Kehai Chen and Youcheng Pan and Yang Xiang and Jinpeng Wang and Min Zhang",
    ),
)
