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

from ...methods.base import Method, RowFacts, prompt_templates
from ...methods.papers import arxiv_paper
from ...rows.spans import MARKS
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .spans import annotations, marks_of, span_marks, strength

_WANTED = {"key": MARKS["K"], "error": MARKS["E"]}


def typed_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads the types of what decided a rollout that has spans of the distilled kind, few enough of them."""
    if not strength(settings, moment.step):
        return [Unused("schedule over", planned=True)] * len(group)
    return [_context(rollout, settings) for rollout in group]


def _context(rollout: Rollout, settings: Any) -> Contexts:
    if isinstance(rollout.note, Exception):
        return Unused("annotation failed")
    marks, wanted = marks_of(rollout), _WANTED[settings.distilled_spans]
    if wanted not in marks:
        return Unused("no span")
    if sum(mark != 0 for mark in marks) > settings.max_span_share * len(marks):
        return Unused("spans too long")
    types = ", ".join(dict.fromkeys(name for *_, kind, name in rollout.note if MARKS[kind] == wanted))
    return (TeacherContext("type", None, anchor=1.0, texts=(("type", types),)),)


def _on_spans(facts: RowFacts, settings: Any) -> torch.Tensor:
    """(B, D) 1 on the tokens that are distilled, else 0."""
    distilled = (facts.given["mark"] == _WANTED[settings.distilled_spans]) & (facts.given["mask"] != 0)
    return facts.keep("on a distilled span", distilled.float())


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
    templates=prompt_templates("type"),
    columns=("spans",),
    needs_columns=lambda settings: () if settings.annotator_function else ("spans",),
    inferred="That error spans are left to GRPO on a strong base and key spans on a weak one, and that the divergence's mean is over all "
    "rollouts, are inferred; the annotator and its prompt are yours.",
    paper=arxiv_paper(
        "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
        "2605.10194",
        "wang2026trace",
        "Jiaxuan Wang and Xuan Ouyang and Zhiyu Chen and Yulan Hu and Zheng Pan and Xin Li and Lan-Zhe Guo",
    ),
)
