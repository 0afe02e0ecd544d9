# SPDX-License-Identifier: Apache-2.0
"""Purified OPSD: what the solution says without the problem is subtracted (arXiv 2607.02234).

target = softmax(log softmax(z_0) + c tanh(Dc / c) / beta), where D is the log-ratio of the teacher that reads problem and
solution to the one that reads the solution alone, and Dc is D less its mean over the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

from ..losses import BoundedShape
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from .base import Method, prompt_templates


def purified_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """Anchor: the frozen base on the plain prompt. Direction: with the problem, less without it."""
    return [
        (
            TeacherContext("plain", None, anchor=1.0),
            TeacherContext("teacher", rollout.shown_solution, direction=1.0),
            TeacherContext("reference", rollout.shown_solution, direction=-1.0),
        )
        for rollout in group
    ]


def bounded_shape(settings: Any, step: int) -> BoundedShape:
    """c tanh(u / c) / beta of the centred direction u."""
    return BoundedShape(settings.tanh_bound, settings.conservativeness)


PURIFIED_OPSD = Method(
    name="Purified OPSD",
    contexts=purified_contexts,
    contexts_from_rows=True,
    shape=bounded_shape,
    templates=prompt_templates("reference"),
    decomposition_steps=lambda settings: settings.decomposition_steps,
    solution_shares=True,
    paper={
        "title": "Purified OPSD: On-Policy Self-Distillation Without Losing How to Think",
        "id": "2607.02234",
        "citation": """@article{shen2026purified,
    title   = {{Purified OPSD: On-Policy Self-Distillation Without Losing How to Think}},
    author  = {Zhanming Shen and others},
    year    = 2026,
    journal = {arXiv preprint arXiv:2607.02234},
}""",
    },
)
