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

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...losses import preference_loss
from ...methods.base import Extra, Method, RowFacts, Seen, prompt_templates
from ...methods.groups import group_label, split_by_reward
from ...methods.papers import arxiv_paper
from ...methods.peers import anchored_views, corrected_weight, feedback_notes
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .siblings import is_expectation, sequence_reward, shown_blocks

_PLAIN = TeacherContext("plain", None, read=1.0)


def variational_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """Siblings or feedback; in an E-step also both prompts as views whose log-probabilities delta is made of."""
    contexts: list[Contexts] = []
    expects = is_expectation(moment.step, settings)
    for index, rollout in enumerate(group):
        blocks = shown_blocks(group, index, settings)
        if not blocks:
            contexts.append(Unused("no sibling to show"))
        elif expects and rollout.reward is None:
            contexts.append(Unused("no reward"))
        else:
            views = anchored_views(blocks, settings)
            contexts.append((*views, _privileged(blocks, settings), _PLAIN) if expects else views)
    return contexts


def judged_sequences(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Extra | None]:
    """In an E-step each rollout behind the teacher's prompt.

    Raises:
        ValueError: a rollout has turns of tools, whose tokens are not the model's.
    """
    if any(rollout.turns for rollout in group):
        raise ValueError(
            "VPD's E-step reads whole rollouts, and these hold turns of tools. Train without `tools`, or use SDPO."
        )
    expects = is_expectation(moment.step, settings)
    shown = [shown_blocks(group, index, settings) if expects else "" for index in range(len(group))]
    return [
        Extra(None, prompt=_privileged(blocks, settings)) if blocks and rollout.reward is not None else None
        for blocks, rollout in zip(shown, group, strict=True)
    ]


def _privileged(blocks: str, settings: Any) -> TeacherContext:
    return TeacherContext("peer", blocks, settings.max_rollout_context_length, read=1.0)


def alternating_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """Terms (B, D) of an M-step, or (B,) of an E-step."""
    if not is_expectation(moment.step, settings):
        return corrected_weight(facts, settings, moment).detach() * facts.clipped_divergence
    reward = sequence_reward(facts, settings)
    side = (facts.given["reward"][:, 0] >= settings.reward_threshold).to(reward.dtype) * 2 - 1
    return settings.expectation_weight * preference_loss(side * (reward - moment.memory.get("midpoint", 0.0)))


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
