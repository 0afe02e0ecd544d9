# SPDX-License-Identifier: Apache-2.0
"""RESD: the teacher reads the attempt, what went wrong with it, and a right one of its own (arXiv 2605.12741).

1. Of a wrong rollout the model writes a review: where it went wrong, and what to do instead.
2. The teacher reads the rollout itself, its feedback, the review, and a right rollout of the same prompt: the scored one where
   it is right, else the last one that was. A rollout with none of the last three is left out.
3. The loss is SDPO's, with one rollout a prompt, with the teacher's probabilities never under 0.2 of the student's, so that the
   pull away from a token is bounded, and with the weights of `losses.outcome_weights`: the rarer outcome weighs more.

4. A playbook of lessons from other problems stands in front of all this: the model writes and judges them (`playbook`).

Differences to the official code: its lessons are written by two requests, one of which is the review itself, and are read in the
batch that they come from, where ours are read from the next one on; it takes a batch of prompts up to four
times in a row with fresh rollouts, where ours goes on to the next; its store of right rollouts has no bound. The mean that
weights are divided by is over the rollouts that have a reward, and one without is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Drafts, Method, RowFacts
from .experience import outcome_memory, outcome_report
from .groups import is_right
from .papers import arxiv_paper
from .peers import blocks, corrected_weight, feedback_notes, prompt_key, shown_text
from .playbook import lesson_request, playbook_block


def review_request(rollout: Rollout, settings: Any) -> TeacherContext | None:
    """What the model answers about a wrong rollout; None for others, and without `write_review`."""
    asks = settings.write_review and is_right(rollout, settings.reward_threshold) is False
    shown = blocks(settings, attempt=shown_text(rollout.completion, settings), feedback=rollout.note)
    return TeacherContext("review", shown, settings.max_rollout_context_length, weights="live") if asks else None


def experience_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view of the rollout, its feedback, its review and a right rollout, as far as there are any."""
    kept, book = moment.memory.get("solutions", {}), playbook_block(settings, moment)
    return [_experience(rollout, settings, kept, book) for rollout in group]


def _experience(rollout: Rollout, settings: Any, kept: Mapping[str, str], book: str) -> Contexts:
    right, attempt = is_right(rollout, settings.reward_threshold), shown_text(rollout.completion, settings)
    if right is None:
        return Unused("no reward")
    review = None if rollout.written is None else shown_text(rollout.written.text, settings)
    solution = attempt if right and settings.max_kept_solutions else kept.get(prompt_key(rollout))
    learnt = blocks(settings, feedback=rollout.note, review=review, solution=solution)
    shown = book + blocks(settings, attempt=attempt) + learnt
    view = TeacherContext("experience", shown, settings.max_rollout_context_length, anchor=1.0)
    return (view,) if learnt else Unused("nothing learnt")


def balanced_weight(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(n,) SDPO's weight, under `balance_outcomes` times that of the rollout's outcome."""
    weight = corrected_weight(facts, settings, moment)
    of_right, of_wrong = moment.memory.get("weights", (1.0, 1.0)) if settings.balance_outcomes else (1.0, 1.0)
    return torch.where(facts.given["reward"] >= settings.reward_threshold, weight * of_right, weight * of_wrong)


RESD = Method(
    name="RESD",
    contexts=experience_contexts,
    needs_solution=False,
    needs_reward=True,
    token_weight=balanced_weight,
    reads_old=True,
    templates=lambda settings: {
        "review": settings.review_prompt_template,
        "experience": settings.experience_prompt_template,
        "lessons": settings.lesson_prompt_template,
        "tags": settings.tag_prompt_template,
    },
    columns=("feedback",),
    notes=feedback_notes,
    asks=review_request,
    drafts=Drafts(lesson_request),
    remember=outcome_memory,
    report=outcome_report,
    paper=arxiv_paper(
        "Learning with Rare Success but Rich Feedback via Reflection-Enhanced Self-Distillation",
        "2605.12741",
        "zhang2026resd",
        "Yuwei Zhang and others",
    ),
)
