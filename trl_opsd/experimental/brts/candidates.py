# SPDX-License-Identifier: Apache-2.0
"""The candidates of BRTS: what the teacher is asked to write beside a rollout, how it is drawn, and which of it is chosen."""

from typing import Any

from ...methods.groups import split_by_reward
from ...teacher.contexts import Draft, Moment, Rollout, TeacherContext


def next_candidate(rollout: Rollout, settings: Any, moment: Moment) -> TeacherContext | None:
    """The prompt that the teacher answers next for a rollout; None where there are candidates enough."""
    written = len(rollout.drafts)
    if not settings.candidate_weight:
        return None
    if written < settings.num_candidates:
        return TeacherContext("teacher", rollout.shown_solution)
    is_missing = not right_candidates(rollout, settings)
    more = is_missing and written < settings.num_candidates + settings.num_guided_candidates
    return TeacherContext("guided", rollout.solution) if more else None


def right_candidates(rollout: Rollout, settings: Any) -> list[Draft]:
    """Those whose reward reaches the threshold."""
    right, _ = split_by_reward(rollout.drafts, settings.reward_threshold)
    return [rollout.drafts[place] for place in right]


def chosen_candidate(rollout: Rollout, settings: Any) -> Draft | None:
    """The right one with most overlap, the first of equals; else what `candidate_fallback` says."""
    first = rollout.drafts[: settings.num_candidates] if settings.candidate_fallback == "most_similar" else ()
    return max(right_candidates(rollout, settings) or first, key=lambda draft: draft.overlap, default=None)


def candidate_kind(rollout: Rollout, settings: Any) -> str:
    """Of which tier the chosen candidate is, in words; empty for the first, and where none are written."""
    chosen = chosen_candidate(rollout, settings)
    if not settings.candidate_weight:
        return ""
    if chosen is None:
        return "no candidate"
    if not right_candidates(rollout, settings):
        return "wrong candidate"
    return "" if chosen in rollout.drafts[: settings.num_candidates] else "guided candidate"


def candidate_sampling(settings: Any) -> dict[str, float]:
    """How candidates are drawn."""
    return {"temperature": settings.candidate_temperature, "top_p": settings.candidate_top_p}
