# SPDX-License-Identifier: Apache-2.0
"""BRTS: beside each rollout the best of several answers of the teacher is learnt (arXiv 2605.09725).

    loss = mean_t KL(student || teacher)(y_<t) + l mean_t KL(teacher || student)(c_<t)

y is the rollout, and the first divergence is over the student's 16 likeliest tokens and one entry for the rest; c is a candidate that
the teacher wrote, and the second is over the teacher's. Candidates are written in tiers:

1. N answers to the teacher's prompt. Of the right ones that is chosen which overlaps most with the student: the share of its tokens
   that are among the student's 16 likeliest at the same place of y.
2. Where none is right, answers to a prompt that asks to use the solution in silence, for checking; of the right ones the same.
3. Where none is right either, that of the first N which overlaps most, or none.

At l = 0 this is plain distillation on the rollouts.

Differences to the paper: its teacher is another model, whose first answers see the bare prompt; here it is the model that has read
the solution, so all candidates have. The official code switches the second divergence off, has weights for it that push away from
the teacher or do not read it, and one, which no script sets, that is the paper's KL; this one is here. Its top 16 are renormalised
for the weights and not for the logarithms; one entry for the rest on both sides is ours, and so is that each mean is over all tokens
of its kind in a step, and that a candidate's tokens behind the rollout's end count as no overlap.
"""

from collections.abc import Sequence
from typing import Any

from ...losses import Divergence, Support
from ...methods.base import Drafts, Extra, Method, Term, prompt_templates
from ...methods.papers import arxiv_paper
from ...teacher.contexts import Contexts, Counted, Moment, Rollout, TeacherContext
from .candidates import candidate_kind, candidate_sampling, chosen_candidate, next_candidate


def rollout_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """The teacher reads every rollout; what became of its candidates is counted where it is not the first tier's."""
    views = [(TeacherContext("teacher", rollout.shown_solution, anchor=1.0),) for rollout in group]
    reasons = [candidate_kind(rollout, settings) for rollout in group]
    return [Counted(own, reason) if reason else own for own, reason in zip(views, reasons, strict=True)]


def chosen_sequences(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Extra | None]:
    """The chosen candidate beside each rollout, as it was sampled, which the teacher reads as it wrote it."""
    chosen = [chosen_candidate(rollout, settings) for rollout in group]
    views = [(TeacherContext("teacher", rollout.shown_solution, anchor=1.0),) for rollout in group]
    return [None if draft is None else Extra(draft.ids, own) for draft, own in zip(chosen, views, strict=True)]


def candidate_divergence(settings: Any) -> Divergence:
    """KL(teacher || student) over the teacher's likeliest tokens and the rest."""
    support = Support(settings.support_size, of="target")
    return Divergence("forward_kl", temperature=settings.loss_temperature, support=support)


BRTS = Method(
    name="BRTS",
    contexts=rollout_contexts,
    needs_reward=True,
    drafts=Drafts(next_candidate, top_k=lambda settings: settings.support_size, sampling=candidate_sampling),
    extras=chosen_sequences,
    extra_term=Term(weight=lambda settings: settings.candidate_weight, divergence=candidate_divergence),
    templates=prompt_templates("guided"),
    own_prompts=True,
    solution_shares=True,
    inferred="The paper's teacher is another model whose first candidates see no solution. One entry for the tokens outside the 16 "
    "likeliest, the means, and that a candidate's tokens behind the rollout's end do not overlap are inferred.",
    paper=arxiv_paper(
        "On-Policy Distillation with Best-of-N Teacher Rollout Selection",
        "2605.09725",
        "zhang2026onpolicy",
        "Ke Zhang and Yunjie Tian and DongDi Zhao and Yijiang Li and Yuanye Liu and Vishal M Patel and Di Fu",
    ),
)
