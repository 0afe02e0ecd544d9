# SPDX-License-Identifier: Apache-2.0
"""MSD: safety in English is carried to other languages, most where it decides (arXiv 2605.02971).

The student reads a request in its language. The teacher reads its English translation too, with the instruction to consider
safety in English and to answer in the request's language.

    loss = mean over rollouts of mean_t w_t KL(student || teacher),    w_t = w_T w_S over the mean of it in the rollout,
    w_T = 1 - H_32(teacher) / log 32,    w_S = 1 - student(y_t)

so that a token counts where the teacher is sure, by its 32 likeliest tokens, and the student was not. No answer is read, so
rows need none; the translation is the column `translation`. A row without one is left out and counted.

Differences to the paper: that the weight of the teacher is this function of its entropy, over its renormalised 32 tokens, and that
weights have mean 1 in a rollout are our reading. Its off-policy form is not here.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...losses import critical_weight, masked_mean
from ...methods.base import Method, RowFacts, prompt_templates
from ...methods.papers import arxiv_paper
from ...rows.texts import is_missing
from ...teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused


def translated_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads the request and its translation; its view is the target."""
    return [_context(rollout.columns.get("translation")) for rollout in group]


def _context(translation: str | None) -> Contexts:
    if is_missing(translation):
        return Unused("no translation")
    return (TeacherContext("translated", None, anchor=1.0, texts=(("translation", translation),)),)


def weighed_divergence(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B,) mean over tokens of w KL(student || teacher)."""
    mask = facts.given["mask"]
    weight = critical_weight(facts.target_top_entropy, facts.log_prob, mask, k=settings.critical_top_k)
    return masked_mean(weight * facts.clipped_divergence, mask)


MSD = Method(
    name="MSD",
    contexts=translated_contexts,
    contexts_from_rows=True,
    needs_solution=False,
    loss=weighed_divergence,
    templates=prompt_templates("translated"),
    columns=("translation",),
    needs_columns=("translation",),
    inferred="How a teacher's entropy becomes its weight, and that weights have mean 1 in a rollout, are inferred: the paper's formula of "
    "the weight was not found.",
    paper=arxiv_paper("Multilingual Safety Alignment via Self-Distillation", "2605.02971", "msd2026"),
)
