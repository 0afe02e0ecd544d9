# SPDX-License-Identifier: Apache-2.0
"""OPSD: the frozen teacher reads problem and reference solution, the student the problem (arXiv 2601.18734)."""

from collections.abc import Sequence
from typing import Any

from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from .base import Method


def privileged_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads problem and reference solution; its view is the target (section 3)."""
    return [(TeacherContext("teacher", rollout.shown_solution, anchor=1.0),) for rollout in group]


def solution_read(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The same view for methods that read the sampled token alone: it is no target, two numbers a token are kept of it."""
    return [(TeacherContext("teacher", rollout.shown_solution, read=1.0),) for rollout in group]


OPSD = Method(
    name="OPSD",
    contexts=privileged_contexts,
    contexts_from_rows=True,
    own_prompts=True,
    solution_shares=True,
    paper={
        "title": "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        "id": "2601.18734",
        "citation": """@article{zhao2026self,
    title   = {{Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models}},
    author  = {Siyan Zhao and Zhihui Xie and Mengchen Liu and Jing Huang and Guan Pang and Feiyu Chen and Aditya Grover},
    year    = 2026,
    journal = {arXiv preprint arXiv:2601.18734},
}""",
    },
)
