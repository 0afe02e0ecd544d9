# SPDX-License-Identifier: Apache-2.0
"""SDPO: the teacher reads a right peer of the rollout (arXiv 2601.20802).

Of a group of rollouts, the teacher of each reads the first other one that is right, without its thinking, and scores the
rollout. The loss is the Jensen-Shannon divergence over the student's 100 likeliest tokens and one entry for the rest, times
min(q(y) / q_old(y), 2), averaged over tokens. A rollout without a right peer is left out, the only right one of a group among
them. The weights of the teacher are a moving average, or its logits are mixed (the trust region): (1 - r) of those of the
initial weights plus r of the student's. The loss takes the policy gradient's place; `reward_weight` adds it.

Differences to the official code: feedback of an environment, which is shown there where no peer is right, is not here, nor is
the weight that corrects for the engine that sampled. The moving average is taken every `teacher_sync_steps` optimizer steps,
there once a generation batch. Logits are mixed as hidden states under one head, so the head must not train.
"""

from collections.abc import Sequence
from typing import Any

from ..rows.texts import without_blocks
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from .base import Method
from .groups import group_label, ratio_weight, split_by_reward


def peer_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The first right rollout but one's own, under the weights of the teacher or under both that are mixed.

    Args:
        group: the rollouts of one prompt, with rewards.
        settings: reads `reward_threshold`, `live_share` and `max_rollout_context_length`.
        moment: not read.
    """
    right, _ = split_by_reward(group, settings.reward_threshold)
    peers = [next((group[j] for j in right if j != index), None) for index in range(len(group))]
    return [() if peer is None else _views(peer, settings) for peer in peers]


def _views(peer: Rollout, settings: Any) -> Contexts:
    text = without_blocks(peer.completion, "<think>", r"</think>\s*")
    share, slot = settings.live_share, ("peer", text, settings.max_rollout_context_length)
    if share is None:
        return (TeacherContext(*slot, anchor=1.0),)
    shares = {"base": 1 - share, "live": share}
    return tuple(TeacherContext(*slot, anchor=part, weights=owner) for owner, part in shares.items() if part)


SDPO = Method(
    name="SDPO",
    contexts=peer_contexts,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    token_weight=ratio_weight,
    reads_old=True,
    owners=lambda settings: () if settings.live_share is None else ("base", "live"),
    templates=lambda settings: {"peer": settings.peer_prompt_template},
    paper={
        "title": "Reinforcement Learning via Self-Distillation",
        "id": "2601.20802",
        "citation": """@misc{sdpo2026,
    title  = {{Reinforcement Learning via Self-Distillation}},
    year   = 2026,
    eprint = {2601.20802},
    archivePrefix = {arXiv},
}""",
    },
)
