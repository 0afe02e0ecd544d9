# SPDX-License-Identifier: Apache-2.0
"""A guard on what the run is for: rewards of rollouts and held-out accuracy, against their start and their noise.

A run can lower accuracy while every number of the collapse guard stays in its range: the divergence falls, because the
student learns what the teacher says, and the teacher says something that does not help. Only a reward shows that.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from .guard import check_action, sound_alarm

# One log of 32 rollouts is uncertain by 0.09 where half of them are right; so many at each end, by 0.03.
MIN_ROLLOUTS = 512
STANDARD_ERRORS = 3.0
LEAST_FALL = 0.1  # of the start: with very many rollouts a fall that matters to nobody is no noise either

# Where right rollouts diverge by at least this share of what wrong ones do, the teacher would not have written them. Runs that
# lost most started at 0.69 to 1.09, but others that lost at 0.17 and two that gained at 1.03 and 1.23 (docs/log.md): it
# explains a fall and foretells none.
_DISAGREES = 0.75


@dataclass(frozen=True)
class PooledReward:
    """Mean reward over some logs in a row.

    Attributes:
        mean: over `num_rollouts`.
        error: its standard error, from the spread of rollouts or that of the logs, whichever is larger: rollouts of a
            group and those of a mini-batch resemble each other.
        num_rollouts: in all of the logs.
        num_logs: how many.
    """

    mean: float
    error: float
    num_rollouts: float
    num_logs: int

    @classmethod
    def of(cls, logs: Iterable[tuple[float, float, float]]) -> "PooledReward | None":
        """The first logs (mean, standard deviation, rollouts) that hold `MIN_ROLLOUTS`; None if there are too few."""
        taken, count = [], 0.0
        for log in logs:
            taken.append(log)
            count += log[2]
            if count >= MIN_ROLLOUTS:
                break
        else:
            return None
        mean = sum(mean * size for mean, _, size in taken) / count
        by_rollout = sum(deviation**2 * size for _, deviation, size in taken) / count**2
        by_log = sum(((log_mean - mean) * size) ** 2 for log_mean, _, size in taken) / count**2
        return cls(mean, math.sqrt(max(by_rollout, by_log)), count, len(taken))

    def has_fallen_from(self, start: "PooledReward") -> bool:
        """Whether it lies below `start` by more than noise, and by enough to matter."""
        fall, noise = start.mean - self.mean, math.hypot(start.error, self.error)
        return fall > max(STANDARD_ERRORS * noise, LEAST_FALL * abs(start.mean))


class AccuracyGuard(TrainerCallback):
    """Warns, or stops the run, when rewards of rollouts or held-out accuracy fall below their start by more than noise.

    Rewards are compared between the first and the newest `MIN_ROLLOUTS` rollouts of the log. Held-out accuracy is what
    [`EvaluationCallback`] logs: its gain over the base with the whole interval below 0. Each is told once.

    Args:
        action: "warn", or "stop" to end training after the step too.
        watches_rewards: False where rewards change by plan.

    Raises:
        ValueError: for another action.
    """

    def __init__(self, action: str = "warn", *, watches_rewards: bool = True):
        check_action(action)
        self.action, self.watches_rewards = action, watches_rewards
        self._told: set[str] = set()

    def on_log(self, args, state, control, **kwargs):
        """Judge the newest log."""
        newest = state.log_history[-1] if state.log_history else {}
        advice = _advice(state.log_history, args)
        found = {"held out": _held_out_fall(newest, advice)}
        if self.watches_rewards and "reward" in newest:
            found["reward"] = _reward_fall(state.log_history, rollouts_per_step(args), advice)
        lines = [text for name, text in found.items() if text is not None and name not in self._told]
        self._told |= {name for name, text in found.items() if text is not None}
        if lines:
            sound_alarm(self.action, f"Accuracy guard at step {newest['step']}:", lines, state, control)


def rollouts_per_step(args: Any) -> float:
    """Fresh rollouts of all processes an optimizer step."""
    share = args.gradient_accumulation_steps / args.steps_per_generation / args.num_iterations
    return args.generation_batch_size * share


def _advice(history: Sequence[Mapping[str, Any]], args: Any) -> str:
    """What the first log says about the teacher, and what to try."""
    start = next((entry for entry in history if "divergence" in entry), {})
    gap, right, wrong = (start.get(name) for name in ("entropy_gap", "divergence/right", "divergence/wrong"))
    found = []
    if right is not None and wrong and right > _DISAGREES * wrong:
        found.append(
            f"The teacher disagreed with right rollouts (divergence/right {right:.2g}) almost as with wrong ones "
            f"(divergence/wrong {wrong:.2g}): its prompt or thinking mode may not suit the student's answers."
        )
    if gap is not None and gap < 0 and args.divergence == "forward_kl":
        found.append(
            f"The teacher was less sure than the student at the start (entropy_gap {gap:.2g}), and forward KL spreads the "
            "student as far; divergence='reverse_kl' loses less."
        )
    found.append("Or lower learning_rate. See docs/troubleshooting.md, 'Accuracy falls though the teacher is right'.")
    return " ".join(found)


def _reward_fall(history: Sequence[Mapping[str, Any]], per_step: float, advice: str) -> str | None:
    logs, before = [], 0
    for entry in history:
        if "reward" not in entry:
            continue
        numbers = entry["reward"], entry["reward_std"]  # None or NaN where no rollout was scored
        if all(number is not None and math.isfinite(number) for number in numbers):
            logs.append((*numbers, (entry["step"] - before) * per_step))
        before = entry["step"]
    start, now = PooledReward.of(logs), PooledReward.of(reversed(logs))
    if start is None or now is None or start.num_logs + now.num_logs > len(logs) or not now.has_fallen_from(start):
        return None
    return (
        f"mean reward of rollouts: {now.mean:.3g} over the newest {now.num_rollouts:.0f}, was {start.mean:.3g} over the first "
        f"{start.num_rollouts:.0f} (standard errors {now.error:.2g} and {start.error:.2g}), unless the problems became harder. "
        f"{advice}"
    )


def _held_out_fall(entry: Mapping[str, Any], advice: str) -> str | None:
    if entry.get("eval/gain_high", 0.0) >= 0:
        return None
    gain, low, high = (100 * entry[f"eval/gain{end}"] for end in ("", "_low", "_high"))
    return f"held-out accuracy against the base: {gain:+.1f} points, 95 % interval [{low:+.1f}, {high:+.1f}]. {advice}"
