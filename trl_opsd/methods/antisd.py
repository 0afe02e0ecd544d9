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

from ..losses import half_softplus
from ..rows.texts import is_missing
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method, RowFacts, Seen
from .groups import split_by_reward

VERDICTS = {True: "correct", False: "incorrect"}


def verdict_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view that is read: a verified solution, and the verdict on the rollout itself.

    Args:
        group: the rollouts of one prompt, with rewards; one without a reward has no verdict and no view.
        settings: reads `reward_threshold` and `max_rollout_context_length`.
        moment: its `draw` picks the peer.
    """
    right, wrong = split_by_reward(group, settings.reward_threshold)
    contexts: list[Contexts] = [Unused("no reward")] * len(group)
    for index in sorted((*right, *wrong)):
        contexts[index] = Unused("no solution")
        solution = _verified(group, [peer for peer in right if peer != index], index, moment)
        if not is_missing(solution):
            verdict = (("verdict", VERDICTS[index in right]),)
            tokens = settings.max_rollout_context_length
            contexts[index] = (TeacherContext("verdict", solution, tokens, read=1.0, texts=verdict),)
    return contexts


def _verified(group: Sequence[Rollout], peers: Sequence[int], index: int, moment: Moment) -> str | None:
    return group[moment.draw.choice(peers)].completion if peers else group[index].solution


def away_from_teacher(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """A - lambda g phi(u), (B, D), with u under the weights that sampled."""
    strength = settings.ascent_strength * moment.memory.get("ascends", 0.0)
    ratio = facts.given["view_log_probs"][0] - facts.given["old_log_prob"]
    return facts.given["advantage"] - strength * half_softplus(ratio)


def entropy_gate_memory(memory: Mapping[str, Any], seen: Seen, settings: Any) -> dict[str, Any]:
    """The gate after a generation batch, for the loss of the same batch.

    Args:
        memory: `warmup` (medians of the first batches), `gate` (g), `ascends` (g, but 0 in the first batches).
        seen: the batch; one in which no view was read changes nothing.
        settings: reads `gate_warmup_batches`, `gate_closes_below` and `gate_opens_at`.
    """
    read = [entropies.flatten() for entropies in seen.view_entropies if entropies.numel()]
    if not read:
        return dict(memory)
    median = torch.cat(read).median().item()  # the lower of two
    warmup, gate = memory.get("warmup", []), memory.get("gate", 1.0)
    if len(warmup) < settings.gate_warmup_batches:
        return {"warmup": [*warmup, median], "gate": gate, "ascends": 0.0}
    gate = _gate(median / (sum(warmup) / len(warmup)), gate, settings) if any(warmup) else gate
    return {"warmup": warmup, "gate": gate, "ascends": gate}


def _gate(share: float, before: float, settings: Any) -> float:
    if share >= settings.gate_opens_at:
        return 1.0
    return 0.0 if share < settings.gate_closes_below else before


def gate_report(memory: Mapping[str, Any]) -> dict[str, float]:
    """The gate that acts, 0 in the first batches."""
    return {"gate": memory.get("ascends", 0.0)}


def own_templates(settings: Any) -> dict[str, str]:
    """The prompt that shows a solution and a verdict."""
    return {"verdict": settings.verdict_prompt_template}


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
    templates=own_templates,
    remember=entropy_gate_memory,
    report=gate_report,
    paper={
        "title": "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information",
        "id": "2605.11609",
        "citation": """@misc{shen2026antisd,
    title  = {{Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information}},
    author = {Guobin Shen and Xiang Cheng and Chenxiao Zhao and Lei Huang and Jindong Li and Dongcheng Zhao and Xing Yu},
    year   = 2026,
    eprint = {2605.11609},
    archivePrefix = {arXiv},
}""",
    },
)
