# SPDX-License-Identifier: Apache-2.0
"""DemoPSD: the teacher's guidance counts less where it disagrees with the plain view (arXiv 2607.02502).

    d = JSD_1/2(S, T),  a = 2 a_max (sigmoid(beta d) - 1/2),  target = norm(T^(1-a) S^a),  loss = w KL(student || target)

One moving average of the student reads both views: T a right rollout of the same prompt, S the plain prompt. The weight
w = min(student / old student, 2) is that of the sampled token. The divergence is taken over the student's likeliest tokens
and one entry for all others, with the target floored. Differences to the paper: d and the mix are of the whole vocabulary,
and the floor is the mix's; the paper restricts and floors the views before it mixes them.
"""

from collections.abc import Sequence
from typing import Any

from ..losses import MixtureShape
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method
from .groups import ratio_weight, right_peers
from .papers import arxiv_paper


def peer_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """T reads a random right peer, never the rollout itself; a rollout without such a peer is left out.

    Args:
        group: the rollouts of one prompt, with rewards.
        settings: reads `reward_threshold` and `max_rollout_context_length`.
        moment: its `draw` picks the peer.
    """
    return [
        _views(moment.draw.choice(peers), settings) if peers else Unused("no right peer")
        for peers in right_peers(group, settings.reward_threshold)
    ]


def _views(peer: str, settings: Any) -> Contexts:
    return (
        TeacherContext("teacher", peer, settings.max_rollout_context_length, anchor=1.0, direction=-1.0),
        TeacherContext("plain", None, direction=1.0),
    )


def mixture_shape(settings: Any, step: int) -> MixtureShape:
    """The geometric mix of both views."""
    return MixtureShape(settings.largest_plain_share, settings.disagreement_sensitivity)


DEMOPSD = Method(
    name="DemoPSD",
    contexts=peer_contexts,
    shape=mixture_shape,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    token_weight=ratio_weight,
    reads_old=True,
    paper=arxiv_paper(
        "DemoPSD: Disagreement-Modulated Policy Self-Distillation",
        "2607.02502",
        "li2026demopsd",
        "Yunhe Li and Hao Shi and Wenhao Liu and Mengzhe Ruan and Hanxu Hou and Zhongxiang Dai and Shuang Qiu and Linqi Song",
    ),
)
