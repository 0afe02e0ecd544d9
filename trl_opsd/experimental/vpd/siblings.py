# SPDX-License-Identifier: Apache-2.0
"""What VPD's teacher reads of a rollout, and the second sequence of an E-step (arXiv 2605.15113)."""

from collections.abc import Sequence
from typing import Any

from ...methods.base import Extra
from ...methods.groups import split_by_reward
from ...methods.peers import anchored_views, block, shown_text
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .expectation import is_expectation

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


def shown_blocks(group: Sequence[Rollout], index: int, settings: Any) -> str:
    """The first right sibling and, where it is to be contrasted, the first wrong one; feedback as SDPO shows it."""
    right, wrong = (
        next((shown_text(group[other].completion, settings) for other in places if other != index), None)
        for places in split_by_reward(group, settings.reward_threshold)
    )
    blocks = block(settings.peer_block, right)
    if settings.show_wrong_sibling:
        blocks += block(settings.wrong_block, wrong)
    if right is None or settings.feedback_beside_peer:
        blocks += block(settings.feedback_block, group[index].note)
    return blocks


def _privileged(blocks: str, settings: Any) -> TeacherContext:
    return TeacherContext("peer", blocks, settings.max_rollout_context_length, read=1.0)
