# SPDX-License-Identifier: Apache-2.0
"""AntiSD: the policy gradient moves away from a teacher that has read the answer (arXiv 2605.11609).

    A_t = A - lambda g phi(u),  phi(u) = (softplus(u) - log 2) / 2,  u = log teacher(y_t) - log student(y_t)

in GRPO's clipped loss: it ascends the Jensen-Shannon divergence from a teacher whose solution makes tokens likely that a
student has to think for. The gate g is 1 until the teacher grows too sure: with h the median of its entropies over a
batch and h_warm their mean over the first batches, g falls to 0 where h < 0.93 h_warm, rises to 1 where h >= h_warm and
stays what it was between. In those first batches the loss is GRPO's.

The teacher is the live student that reads problem, a verified solution (a right peer, else the row's) and whether the
rollout that is scored is right. A rollout without a solution to show is trained by its advantage alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses import LatchedGate, half_softplus
from ..rows.texts import is_missing
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method, RowFacts, Seen, prompt_templates
from .groups import is_right, right_peers
from .papers import arxiv_paper
from .rlsd import surprise

VERDICTS = {True: "correct", False: "incorrect"}


def verdict_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view that is read: a verified solution, and the verdict on the rollout itself; none without a reward."""
    peers = right_peers(group, settings.reward_threshold)
    return [_view(rollout, own, settings, moment) for rollout, own in zip(group, peers, strict=True)]


def _view(rollout: Rollout, peers: Sequence[str], settings: Any, moment: Moment) -> Contexts:
    right = is_right(rollout, settings.reward_threshold)
    if right is None:
        return Unused("no reward")
    solution, tokens = moment.draw.choice(peers) if peers else rollout.solution, settings.max_rollout_context_length
    if is_missing(solution):
        return Unused("no solution")
    return (TeacherContext("verdict", solution, tokens, read=1.0, texts=(("verdict", VERDICTS[right]),)),)


def away_from_teacher(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """A - lambda g phi(u), (B, D), with u under the weights that sampled."""
    gate = facts.keep("gate", moment.memory.get("ascends", 0.0))
    ascent = facts.keep("phi(u)", half_softplus(surprise(facts)))
    return facts.given["advantage"] - settings.ascent_strength * gate * ascent


def entropy_gate_memory(memory: Mapping[str, Any], seen: Seen, settings: Any) -> dict[str, Any]:
    """The gate after a generation batch, for the loss of the same batch; one in which no view was read changes nothing."""
    read = [entropies.flatten() for entropies in seen.view_entropies if entropies.numel()]
    if not read:
        return dict(memory)
    gate = LatchedGate(**memory)
    return gate.after(
        torch.cat(read),
        warmup_batches=settings.gate_warmup_batches,
        closes_below=settings.gate_closes_below,
        opens_at=settings.gate_opens_at,
    )._asdict()


ANTISD = Method(
    name="AntiSD",
    contexts=verdict_contexts,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    advantages=away_from_teacher,
    has_target=False,
    reads_views=True,
    reads_old=True,
    templates=prompt_templates("verdict"),
    remember=entropy_gate_memory,
    report=lambda memory: {"gate": memory.get("ascends", 0.0)},  # the one that acts
    paper=arxiv_paper(
        "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information",
        "2605.11609",
        "shen2026antisd",
        "Guobin Shen and Xiang Cheng and Chenxiao Zhao and Lei Huang and Jindong Li and Dongcheng Zhao and Xing Yu",
    ),
)
