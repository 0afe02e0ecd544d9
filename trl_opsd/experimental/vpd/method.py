# SPDX-License-Identifier: Apache-2.0
"""VPD: the student learns from the teacher, and now and then what the teacher reads is taught to tell right from wrong (arXiv 2605.15113).

One set of weights has two prompts: the bare one, S, and T, which shows siblings of the rollout y or feedback. F optimizer steps are
M-steps, SDPO's loss with reverse KL and the teacher held constant. The next is an E-step, which trains the weights behind T's prompt:

    r = beta (log T(y) - log S(y)), S constant;    loss = -log sigmoid(r - delta) of a right y, -log sigmoid(delta - r) of a wrong one

so that the teacher's own reward of a rollout tells right from wrong. delta is a running midpoint of the mean r of right and of wrong
rollouts. At no E-steps this is SDPO with reverse KL and a live teacher.

Differences to the paper, which we know through a note, without code: the weight of the E-step, the momentum of delta, that r is a sum over
tokens, that both kinds of steps share optimizer and learning rate, that E-steps have rollouts of their own, that delta begins at
0, and which siblings are shown are ours. Self-critique as a context is not here.
"""

from typing import Any

import torch

from ...losses import preference_loss
from ...methods.base import Method, RowFacts, prompt_templates
from ...methods.groups import group_label
from ...methods.papers import arxiv_paper
from ...methods.peers import corrected_weight, feedback_notes
from ...teacher.contexts import Moment
from .expectation import is_expectation, running_midpoint, sequence_reward
from .siblings import judged_sequences, variational_contexts


def alternating_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """Terms (B, D) of an M-step, or (B,) of an E-step."""
    if not is_expectation(moment.step, settings):
        return corrected_weight(facts, settings, moment).detach() * facts.clipped_divergence
    reward = sequence_reward(facts, settings)
    side = (facts.given["reward"][:, 0] >= settings.reward_threshold).to(reward.dtype) * 2 - 1
    return settings.expectation_weight * preference_loss(side * (reward - moment.memory.get("midpoint", 0.0)))


VPD = Method(
    name="VPD",
    contexts=variational_contexts,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    loss=alternating_loss,
    reads_views=True,
    reads_old=True,
    templates=prompt_templates("peer"),
    columns=("feedback",),
    notes=feedback_notes,
    extras=judged_sequences,
    extras_have_prompts=True,
    remember=running_midpoint,
    report=lambda memory: {"midpoint": memory["midpoint"]} if "midpoint" in memory else {},
    inferred="The weight of an E-step, the momentum of its threshold, that its reward is a sum over tokens, that both kinds of steps "
    "share optimizer and learning rate, and which siblings the teacher reads are inferred.",
    paper=arxiv_paper(
        "Learning from Language Feedback via Variational Policy Distillation",
        "2605.15113",
        "li2026learning",
        "Yang Li and Erik Nijkamp and Semih Yavuz and Shafiq Joty",
    ),
)
