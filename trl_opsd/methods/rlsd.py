# SPDX-License-Identifier: Apache-2.0
"""RLSD: the reward gives the sign of a token's advantage, the teacher its size (arXiv 2604.03128, code iie-ycx/RLSD).

    A_t = A [(1 - l) + l clip(exp(sign(A) u), 1 - e, 1 + e)],  u = log teacher(y_t) - log student(y_t)

in GRPO's clipped loss, with the weight held constant: in a right rollout a token weighs more that the teacher finds likelier, in
a wrong one a token that it finds less likely. The frozen teacher reads problem and solution. l falls to 0 over `evidence_steps`
optimizer steps; what is left is GRPO, and the teacher is not asked any more.

u is taken under the weights that sampled, as advantages are. That l falls linearly is ours.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..losses import evidence_weight, held_then_falling
from ..teacher.contexts import Contexts, Moment, Rollout
from .base import Method, RowFacts
from .groups import group_label
from .opsd import solution_read
from .papers import arxiv_paper


def strength_at(settings: Any, step: int) -> float:
    """l after `step` optimizer steps."""
    strength, steps = settings.evidence_strength, settings.evidence_steps
    return strength if steps is None else held_then_falling(step, largest=strength, hold=0, fall=steps)


def solution_while_it_counts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view that is read, of problem and solution; none once l is 0."""
    if strength_at(settings, moment.step) == 0:
        return [()] * len(group)
    return solution_read(group, settings, moment)


def surprise(facts: RowFacts) -> torch.Tensor:
    """u under the weights that sampled, (B, D)."""
    return facts.given["view_log_probs"][0] - facts.given["old_log_prob"]


def confirmed_advantage(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """A_t, (B, D)."""
    advantage, strength = facts.given["advantage"], strength_at(settings, moment.step)
    weight = evidence_weight(surprise(facts), advantage, bound=settings.evidence_bound, strength=strength)
    return advantage * facts.keep("evidence weight", weight)


RLSD = Method(
    name="RLSD",
    contexts=solution_while_it_counts,
    needs_group=True,  # to say which groups are mixed
    needs_reward=True,
    label=group_label,
    advantages=confirmed_advantage,
    has_target=False,
    reads_views=True,
    reads_old=True,
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper("Self-Distilled RLVR", "2604.03128", "rlsd2026"),
)
