# SPDX-License-Identifier: Apache-2.0
"""A guard against collapse: it compares what a run logs with what the run logged at its start.

Long runs of self-distillation fall apart in a few ways that the loss does not show: rollouts run on or break off, the
student's entropy explodes or vanishes, the divergence grows, reflection words flood or drain, text loops.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

GUARDS = ("off", "warn", "stop")

# A log over fewer tokens is noise, and says nothing about a start either.
MIN_TOKENS = 1000


@dataclass(frozen=True)
class Limit:
    """How far a logged number may move from the start, and what to try when it moved further.

    Attributes:
        key: of the log.
        name: in words, with the unit.
        above: alarm above so many times the start; None for no alarm upwards.
        below: alarm below this share of the start; None for no alarm downwards.
        margin: and only if it also moved by at least so much, in its unit: a multiple of nearly nothing is nothing.
        advice_above, advice_below: what to try.
    """

    key: str
    name: str
    above: float | None
    below: float | None
    margin: float
    advice_above: str = ""
    advice_below: str = ""

    def advice(self, start: float, value: float) -> str | None:
        """What to try, or None while the number is within its limits."""
        if abs(value - start) < self.margin:
            return None
        if self.above is not None and value > self.above * start:
            return self.advice_above
        if self.below is not None and value < self.below * start:
            return self.advice_below
        return None


_SLOWER = "lower learning_rate or max_grad_norm, or go on from an earlier checkpoint with fewer max_steps"

LIMITS = (
    Limit("divergence", "unclipped divergence in nats per token", 2.0, None, 0.05, f"{_SLOWER}."),
    Limit(
        "completions/mean_length",
        "completion length in tokens",
        3.0,
        0.25,
        8.0,
        f"rollouts no longer end: {_SLOWER}; look at completions/clipped_ratio and the completions table.",
        f"rollouts break off: {_SLOWER}; check that the teacher's thinking mode is the one you mean "
        "(teacher_chat_template_kwargs).",
    ),
    Limit(
        "student_entropy",
        "student's entropy in nats per token",
        3.0,
        0.05,
        0.05,
        f"the student comes apart: {_SLOWER}.",
        "the student stops exploring: stop here, or raise temperature, or use divergence='forward_kl'.",
    ),
    Limit(
        "reflection_markers_per_1000",
        "reflection markers per 1,000 tokens",
        8.0,
        0.1,
        4.0,
        "the teacher's habit floods the student: set num_loss_tokens_to_skip or clip, use PurifiedOPSDTrainer, or stop "
        "earlier.",
        "the student stops reflecting: use PurifiedOPSDTrainer, let the teacher think (teacher_chat_template_kwargs), "
        "or stop earlier.",
    ),
    # From any start: a text with half of its 4-grams repeated loops. A share has no useful multiple.
    Limit("completions/repetition", "share of repeated 4-grams", 1.0, None, 0.25, f"rollouts loop: {_SLOWER}."),
    Limit(
        "completions/looping_ratio", "share of long rollouts that loop", 1.0, None, 0.1, f"rollouts loop: {_SLOWER}."
    ),
)


def check_action(action: str) -> None:
    """Refuse what a guard cannot do."""
    if action not in GUARDS[1:]:
        raise ValueError(f"action={action!r} is not known; set one of {GUARDS[1:]}, or add no guard.")


def sound_alarm(action: str, heading: str, lines: Sequence[str], state: Any, control: Any) -> None:
    """Warn of the lines, on one process, and stop the run if the guard is to."""
    if action == "stop":
        control.should_training_stop = True
        lines = [*lines, "Training stops after this step (guard='stop')."]
    if state.is_world_process_zero:
        warnings.warn("\n- ".join([heading, *lines]), stacklevel=3)


# Cosine below which next to nothing of the unclipped gradient is left; see docs/log.md for the measurements.
LEAST_CLIP_AGREEMENT = 0.1


class ClipWarning(TrainerCallback):
    """Warns at the first log if the clip has turned the gradient of the loss."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Judge the agreement, which is measured at the first step alone."""
        entry = logs or {}
        agreement = entry.get("clip_gradient_agreement", 1.0)
        is_noise = entry.get("num_tokens", MIN_TOKENS) < MIN_TOKENS
        if agreement >= LEAST_CLIP_AGREEMENT or is_noise or not state.is_world_process_zero:
            return
        warnings.warn(
            f"clip={args.clip!r} with clip_value={args.clip_value}: the clipped gradient agrees with the unclipped one to "
            f"{agreement:.2f} at the first step (cosine: 1 is the same direction, 0 none of it, below 0 the opposite), so "
            "training may raise the divergence from the teacher and lower accuracy, as it does on small vocabularies. "
            "Set clip=None (on the command line: none), or a larger clip_value.",
            stacklevel=2,
        )


# Nats. A teacher that learns nothing from its context has a gap of 0 but for noise; see docs/log.md for the measurements.
LEAST_ENTROPY_GAP = -0.005


class TeacherWarning(TrainerCallback):
    """Warns at the first log if the teacher is less sure of the student's rollouts than the student itself.

    Of methods whose teacher is shown the reference: what it knows more should make it surer.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Judge the first log that has an entropy gap."""
        entry = logs or {}
        gap = entry.get("entropy_gap", 0.0)
        is_first = sum("entropy_gap" in log for log in state.log_history) <= 1
        is_noise = entry.get("num_tokens", MIN_TOKENS) < MIN_TOKENS
        if gap >= LEAST_ENTROPY_GAP or not is_first or is_noise or not state.is_world_process_zero:
            return
        warnings.warn(
            f"The teacher, which reads the reference, is less sure of the student's rollouts than the student (entropy_gap "
            f"{gap:.2g} nats at the first log). Runs of a small model that started so lost accuracy. Its prompt or thinking "
            "mode may not suit the student's answers: look at teacher_prompt_template and teacher_chat_template_kwargs, and "
            "at docs/troubleshooting.md, 'Accuracy falls though the teacher is right'. guard='off' leaves this out.",
            stacklevel=2,
        )


# A hard set has such a start, too. One that a model answers in its other thinking mode alone starts at 0.
MOST_RIGHT_TO_TELL = 0.02
_RIGHT = "rewards/accuracy_reward/mean"


class AnswerWarning(TrainerCallback):
    """Warns at the first log if almost no rollout is right: the model may be asked in a form that it has not learnt.

    Reads the reward that verifies answers against the row's solution; a user's own rewards have scales of their own.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Judge the first log that has this reward."""
        entry = logs or {}
        right = entry.get(_RIGHT)
        is_first = sum(_RIGHT in log for log in state.log_history) <= 1
        is_noise = entry.get("num_tokens", MIN_TOKENS) < MIN_TOKENS
        if (
            right is None
            or not right <= MOST_RIGHT_TO_TELL
            or not is_first
            or is_noise
            or not state.is_world_process_zero
        ):
            return
        warnings.warn(
            f"Almost no rollout is right at the start ({_RIGHT} {right:.3g} at the first log). If the model solves such problems, it is "
            "asked in a form that it has not learnt, and what it learns now may cost what it can do: compare `trl-opsd eval` with "
            f"--thinking on and off and train in the better mode (chat_template_kwargs={args.chat_template_kwargs!r} now), and look at both "
            "prompts with `trl-opsd dry-run`. guard='off' leaves this out.",
            stacklevel=2,
        )


class CollapseGuard(TrainerCallback):
    """Warns, or stops the run, when its log leaves the range of its start.

    The start is the first log over at least `min_tokens` tokens; with `logging_first_step` that is the untrained
    model's. Each number is told once in each direction. A resumed run keeps its start, which is in its log history.

    Args:
        action: "warn", or "stop" to end training after the step too.
        limits: what is watched.
        min_tokens: logs over fewer tokens are passed over.

    Raises:
        ValueError: for another action.
    """

    def __init__(self, action: str = "warn", limits: Sequence[Limit] = LIMITS, min_tokens: int = MIN_TOKENS):
        check_action(action)
        self.action, self.limits, self.min_tokens = action, limits, min_tokens
        self._told: set[tuple[str, str]] = set()

    def on_log(self, args, state, control, **kwargs):
        """Compare the newest log with the start."""
        entries = self._entries(state.log_history)
        if len(entries) < 2 or entries[-1] is not state.log_history[-1]:
            return
        start, now = entries[0], entries[-1]
        seen = [text for limit in self.limits if (text := self._judge(limit, start, now)) is not None]
        if seen:
            heading = f"Collapse guard at step {now['step']}, against step {start['step']}:"
            sound_alarm(self.action, heading, seen, state, control)

    def _entries(self, history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Training logs over enough tokens; `num_tokens` in them counts from the start of the run."""
        entries, before = [], 0
        for entry in history:
            if "divergence" not in entry:
                continue
            tokens = entry.get("num_tokens", 0)
            if tokens - before >= self.min_tokens:
                entries.append(entry)
            before = tokens
        return entries

    def _judge(self, limit: Limit, start: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        before, value = start.get(limit.key), now.get(limit.key)
        if before is None or value is None:
            return None
        advice = limit.advice(before, value)
        if advice is None or (limit.key, advice) in self._told:
            return None
        self._told.add((limit.key, advice))
        return f"{limit.name}: {value:.3g}, was {before:.3g}. Try: {advice}"
