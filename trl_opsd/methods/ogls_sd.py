# SPDX-License-Identifier: Apache-2.0
"""OGLS-SD: the plain teacher's logits, steered by right rollouts against wrong ones (arXiv 2605.12400).

z* = z(x) + lambda (mean over P+ of z(x, g) - mean over P- of z(x, g)), distilled on wrong rollouts alone. P+ holds the
right rollouts and the solution if there is one, P- the wrong ones. All stand in the same slot of the same template, so
that what showing any solution does cancels.
"""

from collections.abc import Sequence
from typing import Any

from ..losses import LinearShape, Shape
from ..rows.texts import is_missing, without_blocks
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from .base import Method
from .groups import group_label, split_by_reward
from .papers import arxiv_paper


def steering_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """Contexts of the wrong rollouts; none for a group that lacks a pool.

    Args:
        group: the rollouts of one prompt, with rewards.
        settings: reads `reward_threshold`, `steering_teacher`, `max_contexts_per_pool`, `max_rollout_context_length`
            and `strip_thinking`.
        moment: its `draw` picks contexts where a pool is capped.
    """
    right, wrong = split_by_reward(group, settings.reward_threshold)
    inserted = {index: _inserted(group[index], settings) for index in (*right, *wrong)}
    positives = [inserted[index] for index in right]
    solution = next((rollout.solution for rollout in group if not is_missing(rollout.solution)), None)
    if solution is not None:
        positives.append((solution, None))
    contexts: list[Contexts] = [()] * len(group)
    if not positives or not wrong:
        return contexts
    positives = _capped(positives, settings.max_contexts_per_pool, moment.draw)
    for index in wrong:
        negatives = _capped([inserted[j] for j in wrong], settings.max_contexts_per_pool, moment.draw)
        contexts[index] = _views(positives, negatives, settings.steering_teacher)
    return contexts


def _views(positives: list, negatives: list, teacher: str) -> Contexts:
    share = 1.0 / len(positives)
    if teacher == "mean_of_positives":
        return tuple(TeacherContext("teacher", *inserted, anchor=share) for inserted in positives)
    plain = TeacherContext("plain", None, anchor=1.0, direction=-1.0 if teacher == "positive_only" else 0.0)
    views = [TeacherContext("teacher", *inserted, direction=share) for inserted in positives]
    if teacher == "steered":
        share = -1.0 / len(negatives)
        views += [TeacherContext("teacher", *inserted, direction=share) for inserted in negatives]
    return (plain, *views)


def steering_shape(settings: Any, step: int) -> Shape:
    """lambda, growing linearly to `steering_strength` over `steering_warmup_steps` optimizer steps."""
    if settings.steering_teacher == "mean_of_positives":
        return Shape()
    ramp = min(1.0, (step + 1) / settings.steering_warmup_steps) if settings.steering_warmup_steps else 1.0
    return LinearShape(settings.steering_strength * ramp)


def _inserted(rollout: Rollout, settings: Any) -> tuple[str, int | None]:
    text = rollout.completion
    if settings.strip_thinking:
        text = without_blocks(text, "<think>", r"</think>\s*")
    return text, settings.max_rollout_context_length


def _capped(pool: list, most: int | None, draw: Any) -> list:
    return pool if most is None or len(pool) <= most else draw.sample(pool, most)


OGLS_SD = Method(
    name="OGLS-SD",
    contexts=steering_contexts,
    shape=steering_shape,
    needs_solution=False,
    needs_group=True,
    needs_reward=True,
    label=group_label,
    paper=arxiv_paper(
        "OGLS-SD: On-Policy Self-Distillation with Outcome-Guided Logit Steering",
        "2605.12400",
        "ogls-sd2026",
    ),
)
