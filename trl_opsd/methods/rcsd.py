# SPDX-License-Identifier: Apache-2.0
"""RCSD: the teacher reads the answer, a rubric, and what it wrote itself about both (arXiv 2606.19327).

1. The model is shown problem, solution and rubric, and writes what these require, without solving the problem.
2. The teacher reads all of it and scores the student's rollout.
3. Forward KL over the teacher's 20 likeliest tokens, both sides renormalised, each term cut at 0.05. Mass outside the 20 is
   not seen: a student may move any of it.

Differences to the official code: the text of 1. is written by the teacher's weights as there, but under vLLM by the student's, for
its engine holds no others; and it stands with the instruction not to cite it in the user's message, there in the teacher's turn. The rubric comes from the column
`rubric`, a list of texts or one; the generator of rubrics that the paper trains first is not here.
"""

from collections.abc import Sequence
from typing import Any

from ..rows.texts import is_missing
from ..teacher.contexts import Contexts, Counted, Moment, Rollout, TeacherContext
from .base import Method

_RUBRIC = "\n\nWhat a good solution fulfils:\n"
_NOTES = "\n\nNotes on what is required:\n"


def analysis_request(rollout: Rollout, settings: Any) -> TeacherContext | None:
    """What the model answers before the teacher scores; None without `write_analysis`."""
    return _context("analysis", rollout, _rubric(rollout)) if settings.write_analysis else None


def guided_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads problem, solution, rubric and analysis; its view is the target. A row without a rubric is counted."""
    return [_guided(rollout) for rollout in group]


def _guided(rollout: Rollout) -> Contexts:
    rubric = _rubric(rollout)
    views = (_context("guided", rollout, rubric + _analysis(rollout), anchor=1.0),)
    return views if rubric else Counted(views, "no rubric")


def _context(template: str, rollout: Rollout, guidance: str, **weights: float) -> TeacherContext:
    return TeacherContext(template, rollout.solution, texts=(("guidance", guidance),), **weights)


def _rubric(rollout: Rollout) -> str:
    rubric = rollout.columns.get("rubric")
    if rubric is None or isinstance(rubric, str):
        return "" if is_missing(rubric) else _RUBRIC + rubric
    return _RUBRIC + "\n".join(f"- {criterion}" for criterion in rubric) if rubric else ""


def _analysis(rollout: Rollout) -> str:
    written = rollout.written
    return "" if written is None or is_missing(written.text) else _NOTES + written.text.strip()


RCSD = Method(
    name="RCSD",
    contexts=guided_contexts,
    asks=analysis_request,
    templates=lambda settings: {
        "analysis": settings.analysis_prompt_template,
        "guided": settings.guided_prompt_template,
    },
    columns=("rubric",),
    paper={
        "title": "Rethinking Reward Supervision: Rubric-Conditioned Self-Distillation",
        "id": "2606.19327",
        "citation": """@misc{rcsd2026,
    title  = {{Rethinking Reward Supervision: Rubric-Conditioned Self-Distillation}},
    author = {Siyi Gu and Jialin Chen and Sophia Zhou and Arman Cohan and Rex Ying},
    year   = 2026,
    eprint = {2606.19327},
    archivePrefix = {arXiv},
}""",
    },
)
