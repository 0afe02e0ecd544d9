# SPDX-License-Identifier: Apache-2.0
"""SDPO: the teacher reads a right peer of the rollout, or what an environment says of it (arXiv 2601.20802).

Of a group of rollouts, the teacher of each reads the first other one that is right, without its thinking, and scores the
rollout. Where no other is right it reads the rollout's feedback, and with `feedback_beside_peer` it reads both. A rollout
with neither is left out, the only right one of a group without feedback among them. The loss is

    mean over tokens of min(q(y) / q_old(y), 2) min(q_old(y) / q_engine(y), 2) JSD(p, q)

over the student's 100 likeliest tokens and one entry for the rest. The weights of the teacher are a moving average, taken once
a generation batch, or its logits are mixed (the trust region): (1 - r) of those of the initial weights plus r of the
student's. The loss takes the policy gradient's place; `reward_weight` adds it, where the paper's text mixes advantages.

Differences to the official code: logits are mixed as hidden states under one head, so the head must not train; and all that
the teacher reads is shortened in its middle where it is too long, there a prompt loses its end.
"""

from collections.abc import Sequence
from typing import Any

from ..teacher.contexts import Contexts, Moment, Rollout, Unused
from .base import Method, prompt_templates
from .groups import group_label, split_by_reward
from .papers import arxiv_paper
from .peers import anchored_views, block, corrected_weight, feedback_notes, mix_owners, shown_text


def peer_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The first right rollout but one's own, or feedback, or both.

    Args:
        group: the rollouts of one prompt, with rewards and perhaps feedback.
        settings: reads `reward_threshold`, `strip_thinking`, `feedback_beside_peer`, `live_share`,
            `max_rollout_context_length`, `peer_block` and `feedback_block`.
        moment: not read.
    """
    right, _ = split_by_reward(group, settings.reward_threshold)
    contexts: list[Contexts] = []
    for index, rollout in enumerate(group):
        peer = next((shown_text(group[other].completion, settings) for other in right if other != index), None)
        blocks = block(settings.peer_block, peer)
        if not blocks or settings.feedback_beside_peer:
            blocks += block(settings.feedback_block, rollout.note)
        contexts.append(anchored_views(blocks, settings) if blocks else Unused("no right peer"))
    return contexts


SDPO = Method(
    name="SDPO",
    contexts=peer_contexts,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    token_weight=corrected_weight,
    reads_old=True,
    owners=mix_owners,
    templates=prompt_templates("peer"),
    columns=("feedback",),
    notes=feedback_notes,
    paper=arxiv_paper("Reinforcement Learning via Self-Distillation", "2601.20802", "sdpo2026"),
)
