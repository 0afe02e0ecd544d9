# SPDX-License-Identifier: Apache-2.0
"""TRACE: decisive spans of a rollout are distilled for a while, all else is GRPO's (arXiv 2605.10194).

An annotator marks in a rollout key spans (K, in right ones) or error spans (E, in wrong ones) and names the coarse type of what
decided it. The teacher reads the question and that type, no text of the rollout. With lambda = w_0 for some steps, then falling to
0,

    loss = GRPO off spans + (1 - lambda / w_0) GRPO on spans + lambda / |y| sum over spans of KL, each term cut at 0.05,

where spans are those of the kind that is distilled: key ones with KL(teacher || student) on a strong base, error ones with
KL(student || teacher) on a weak one. After the schedule no annotator and no teacher is asked: this is GRPO.

Differences to the paper: its annotator stands behind `annotator_function`. That spans of the other kind stay GRPO's alone, that
a token which a span touches belongs to it, that several types stand in one line, and that the mean of the last term is over all
rollouts are ours. A failed annotation is no span, as there; a rollout whose spans hold more than a quarter of its tokens is left to
GRPO, and both are counted.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...losses import held_then_falling
from ...methods.base import Method, RowFacts
from ...rows.spans import MARKS, read_spans, token_marks
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from ...user_functions import ask_function
from .settings import TAKES

_WANTED = {"key": MARKS["K"], "error": MARKS["E"]}


def strength(settings: Any, step: int) -> float:
    """lambda / w_0 after `step` optimizer steps, in [0, 1]."""
    return held_then_falling(step, largest=1.0, hold=settings.span_hold_steps, fall=settings.span_fall_steps)


def annotations(rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[Any]:
    """Of each rollout its spans, an error where they cannot be read, or None where nobody is asked any more."""
    if not strength(settings, moment.step):
        return [None] * len(rollouts)
    name = settings.annotator_function
    if name is None:
        found = [rollout.columns.get("spans") for rollout in rollouts]
    else:
        found = ask_function(
            name,
            "annotator_function",
            rollouts,
            takes=TAKES,
            failing="are counted in the log and not distilled",
        )
    return [read_spans(spans, len(rollout.completion)) for spans, rollout in zip(found, rollouts, strict=True)]


def span_marks(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[list[float]]:
    """Of each token 1 in a key span, -1 in an error span, 0 elsewhere; a token that a span touches belongs to it."""
    return [_marks(rollout) for rollout in group]


def _marks(rollout: Rollout) -> list[float]:
    return token_marks(rollout.note if isinstance(rollout.note, tuple) else (), rollout.token_ends)


def typed_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads the types of what decided a rollout that has spans of the distilled kind, few enough of them."""
    if not strength(settings, moment.step):
        return [Unused("schedule over", planned=True)] * len(group)
    return [_context(rollout, settings) for rollout in group]


def _context(rollout: Rollout, settings: Any) -> Contexts:
    if isinstance(rollout.note, Exception):
        return Unused("annotation failed")
    marks, wanted = _marks(rollout), _WANTED[settings.distilled_spans]
    if wanted not in marks:
        return Unused("no span")
    if sum(mark != 0 for mark in marks) > settings.max_span_share * len(marks):
        return Unused("spans too long")
    types = ", ".join(dict.fromkeys(name for *_, kind, name in rollout.note if MARKS[kind] == wanted))
    return (TeacherContext("type", None, anchor=1.0, texts=(("type", types),)),)


def _on_spans(facts: RowFacts, settings: Any) -> torch.Tensor:
    """(B, D) 1 on the tokens that are distilled, else 0."""
    return ((facts.given["mark"] == _WANTED[settings.distilled_spans]) & (facts.given["mask"] != 0)).float()


def span_divergence(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B,) lambda / |y| times the sum over spans of the clipped divergence."""
    total = (_on_spans(facts, settings) * facts.clipped_divergence).sum(-1)
    return settings.span_weight * strength(settings, moment.step) * total / facts.given["length"][:, 0].clamp(min=1)


def relieved_advantages(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B, D) A off spans, (1 - lambda / w_0) A on them."""
    return facts.given["advantage"] * (1 - strength(settings, moment.step) * _on_spans(facts, settings))


TRACE = Method(
    name="TRACE",
    contexts=typed_contexts,
    needs_solution=False,
    needs_reward=True,
    notes=annotations,
    marks=span_marks,
    loss=span_divergence,
    averages_all=True,
    advantages=relieved_advantages,
    templates=lambda settings: {"type": settings.type_prompt_template},
    columns=("spans",),
    needs_columns=lambda settings: () if settings.annotator_function else ("spans",),
    inferred="That error spans are left to GRPO on a strong base and key spans on a weak one, and that the divergence's mean is over all "
    "rollouts, are inferred; the annotator and its prompt are yours.",
    paper={
        "title": "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
        "id": "2605.10194",
        "citation": """@misc{wang2026trace,
    title  = {{TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment}},
    author = {Jiaxuan Wang and Xuan Ouyang and Zhiyu Chen and Yulan Hu and Zheng Pan and Xin Li and Lan-Zhe Guo},
    year   = 2026,
    eprint = {2605.10194},
    archivePrefix = {arXiv},
}""",
    },
)
