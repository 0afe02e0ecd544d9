# SPDX-License-Identifier: Apache-2.0
"""MOPD: SDPO whose teacher reads two right peers and a wrong one (arXiv 2605.12652).

The teacher of a rollout reads the first two other right rollouts, then one other wrong one, drawn at random and said to be a
failure, then, where no other is right, the rollout's feedback; its own text it reads as neither. Whoever has any of these is
trained, so a group that is all wrong learns from a wrong peer alone. Loss and weights of the teacher are SDPO's. With one
right peer and no wrong one it is SDPO.

The official run shows two right peers and a wrong one, the default of its settings file the first right peer alone. Thinking
stays in what is shown. Differences to the official code: as SDPO's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..teacher.contexts import Contexts, Moment, Rollout, Unused
from .groups import split_by_reward
from .papers import arxiv_paper
from .peers import anchored_views, block, shown_text
from .sdpo import SDPO


def multi_peer_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """Right peers, wrong peers and, beside no right one, feedback, in this order; never the rollout itself.

    Args:
        group: the rollouts of one prompt, with rewards and perhaps feedback.
        settings: reads what SDPO's rule does, `max_right_peers`, `max_wrong_peers` and `wrong_block`.
        moment: its `draw` picks the wrong peers.
    """
    right, wrong = split_by_reward(group, settings.reward_threshold)
    contexts: list[Contexts] = []
    for index, rollout in enumerate(group):
        failures = [other for other in wrong if other != index]
        shown = [other for other in right if other != index][: settings.max_right_peers]
        drawn = moment.draw.sample(failures, min(settings.max_wrong_peers, len(failures)))
        blocks = "".join(block(settings.peer_block, shown_text(group[other].completion, settings)) for other in shown)
        blocks += "".join(block(settings.wrong_block, shown_text(group[other].completion, settings)) for other in drawn)
        if not shown or settings.feedback_beside_peer:
            blocks += block(settings.feedback_block, rollout.note)
        contexts.append(anchored_views(blocks, settings) if blocks else Unused("no peer"))
    return contexts


MOPD = replace(
    SDPO,
    name="MOPD",
    contexts=multi_peer_contexts,
    paper=arxiv_paper(
        "Multi-Rollout On-Policy Distillation via Peer Successes and Failures",
        "2605.12652",
        "mopd2026",
    ),
)
