# SPDX-License-Identifier: Apache-2.0
"""Which guards watch the log of a run."""

from transformers import TrainerCallback

from ..methods import Method
from ..monitoring.accuracy_guard import AccuracyGuard
from ..monitoring.guard import LIMITS, AnswerWarning, ClipWarning, CollapseGuard, TeacherWarning
from .config import OPSDConfig


def guards_of(method: Method, settings: OPSDConfig, *, grows_rollouts: bool) -> list[TrainerCallback]:
    """The callbacks that warn of a run, or stop it.

    Args:
        method: of the run.
        settings: of the run; `guard` says what the callbacks do.
        grows_rollouts: sampling stops where a growing distillation does.
    """
    guards: list[TrainerCallback] = [ClipWarning()]
    if settings.guard == "off":
        return guards
    planned = _planned_changes(method, settings, grows_rollouts)
    limits = [limit for limit in LIMITS if limit.key not in planned]
    guards += [AnswerWarning(), CollapseGuard(settings.guard, limits)]
    if method.needs_solution and method.has_target:
        guards.append(TeacherWarning())
    return [*guards, AccuracyGuard(settings.guard, watches_rewards="reward" not in planned)]


def _planned_changes(method: Method, settings: OPSDConfig, grows_rollouts: bool) -> set[str]:
    """Logged numbers that change by plan, which a guard is not to take for a collapse."""
    planned = set()
    if method.shape(settings, 0) != method.shape(settings, settings.max_steps):  # OGLS-SD's lambda
        planned.add("divergence")
    if settings.solution_share_at(0) != settings.solution_share_at(None):
        planned.add("divergence")
    if settings.horizon() is not None:
        planned |= {"divergence", "student_entropy"}  # of other positions
        planned |= {"completions/mean_length", "reward"} if grows_rollouts else set()
    return planned
