# SPDX-License-Identifier: Apache-2.0
"""RCSD: the teacher reads the answer, a rubric, and what it wrote itself about both (arXiv 2606.19327).

1. The model is shown problem, solution and rubric, and writes what these require, without solving the problem.
2. The teacher goes on in the same turn: a bridge tells it to solve the problem without citing any of it, and it scores the student's
   rollout.
3. Forward KL over the teacher's 20 likeliest tokens, both sides renormalised, each term cut at 0.05. Mass outside the 20 is
   not seen: a student may move any of it.

Without 1. (`write_analysis=False`) the instruction not to cite stands in the user's message, and with no rubric either this is OPSD.

Differences to the official code: under vLLM the text of 1. is written by the student's weights, there by the teacher's, for vLLM's
engine holds no others. The rubric comes from the column `rubric`, a list of texts or one, and a row without one is counted; the
generator of rubrics that the paper trains first is not here. The words of prompts and bridge are ours.
"""

from collections.abc import Sequence
from typing import Any

from ..rows.texts import is_missing
from ..teacher.contexts import Contexts, Counted, Moment, Rollout, TeacherContext
from .base import Method, prompt_templates
from .papers import arxiv_paper

_RUBRIC = "\n\nWhat a good solution fulfils:\n"


def analysis_request(rollout: Rollout, settings: Any) -> TeacherContext | None:
    """What the model answers before the teacher scores; None without `write_analysis`."""
    return _context("analysis", rollout, _rubric(rollout)) if settings.write_analysis else None


def guided_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads problem, solution, rubric and analysis; its view is the target. A row without a rubric is counted."""
    return [_guided(rollout, settings) for rollout in group]


def _guided(rollout: Rollout, settings: Any) -> Contexts:
    rubric, written = _rubric(rollout), rollout.written
    if written is None or is_missing(written.text):
        views = (_context("guided", rollout, rubric, anchor=1.0),)
    else:
        views = (_context("analysis", rollout, rubric, anchor=1.0, opening=written.text.strip() + settings.bridge),)
    return views if rubric else Counted(views, "no rubric")


def _context(template: str, rollout: Rollout, guidance: str, **rest: Any) -> TeacherContext:
    return TeacherContext(template, rollout.shown_solution, texts=(("guidance", guidance),), **rest)


def _rubric(rollout: Rollout) -> str:
    rubric = rollout.columns.get("rubric")
    if rubric is None or isinstance(rubric, str):
        return "" if is_missing(rubric) else _RUBRIC + rubric
    return _RUBRIC + "\n".join(f"- {criterion}" for criterion in rubric) if rubric else ""


RCSD = Method(
    name="RCSD",
    contexts=guided_contexts,
    asks=analysis_request,
    templates=prompt_templates("analysis", "guided"),
    columns=("rubric",),
    solution_shares=True,
    paper=arxiv_paper(
        "Rethinking Reward Supervision: Rubric-Conditioned Self-Distillation",
        "2606.19327",
        "rcsd2026",
        "Siyi Gu and Jialin Chen and Sophia Zhou and Arman Cohan and Rex Ying",
    ),
)
