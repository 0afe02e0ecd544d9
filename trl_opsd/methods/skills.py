# SPDX-License-Identifier: Apache-2.0
"""The skills that SGSD's teachers read: those of a bank that suit a problem, and which bank that was, or those of the row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..rows.skill_bank import skill_bank_file
from ..rows.texts import message_text
from ..teacher.contexts import Moment, Rollout
from .base import Seen


def skills_from_bank(rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[Any]:
    """Of each rollout texts with scores, the bank's digest and the step at which it was read; None without a bank.

    Args:
        rollouts: of this rank.
        settings: reads `skill_bank` and what belongs to it.
        moment: its memory holds the digest and the step of before.
    """
    if settings.skill_bank is None:
        return [None] * len(rollouts)
    digest, read_at = moment.memory.get("skill_bank", (None, 0))
    due = digest is None or moment.step - read_at >= settings.skill_bank_refresh_steps
    bank = skill_bank_file(settings.skill_bank, settings.skill_embedding_model).current(digest, due=due)
    read_at = moment.step if due else read_at
    problems = [
        prompt if isinstance(prompt, str) else message_text(prompt[-1]) for prompt in (r.prompt for r in rollouts)
    ]
    found = {problem: tuple(bank.retrieve(problem, settings.max_skills)) for problem in dict.fromkeys(problems)}
    return [(found[problem], bank.digest, read_at) for problem in problems]


def remember_bank(memory: Mapping[str, Any], seen: Seen, settings: Any) -> dict[str, Any]:
    """Digest of the bank that was used, and the step at which it was read: those of the batch's first rollout."""
    note = seen.rollouts[0].note
    return {} if note is None else {"skill_bank": list(note[1:])}


def weighted_skills(rollout: Rollout, most: int) -> list[tuple[str, float]]:
    """The skills of a rollout with the softmax of their scores, the best first, or alike and in their order without scores.

    Args:
        rollout: its note comes from a bank, or its columns hold `skills`, a list of texts, and perhaps `skill_scores`, a number
            for each.
        most: of them, >= 1.

    Raises:
        ValueError: a row has another number of scores than of skills.
    """
    skills, scores = rollout.columns.get("skills") or [], rollout.columns.get("skill_scores")
    if rollout.note is not None:
        skills, scores = (list(part) for part in zip(*rollout.note[0], strict=True))
    if scores is not None and skills and len(scores) != len(skills):
        raise ValueError(
            f"`skill_scores` has {len(scores)} numbers for {len(skills)} texts in `skills`; give one for each, or None."
        )
    order = sorted(range(len(skills)), key=lambda k: -scores[k]) if scores else range(len(skills))
    kept = [(skills[k], math.exp(scores[k] - max(scores)) if scores else 1.0) for k in list(order)[:most]]
    total = sum(weight for _, weight in kept)
    return [(text, weight / total) for text, weight in kept]
