# SPDX-License-Identifier: Apache-2.0
"""A line a logged step and a few rollouts every so often, in place of a bar, a dictionary of all numbers and whole rollouts.

The commands print them. A script of one's own does with `show_steps(trainer)`.
"""

import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..trainers.rollout_text import spread
from .rollout_table import rollout_table
from .terminal import VERBOSE

# Of the many logged numbers those that tell how a step went; the others are in log.jsonl and the trackers.
# The prefixes `eval_` and `eval/` are left out.
_SHOWN = {
    "avg@k": "avg@k",
    "gain": "gain",
    "completion_length": "length",
    "loss": "loss",
    "divergence": "divergence",
    "reward": "reward",
    "mean_token_accuracy": "token accuracy",
    "completions/mean_length": "length",
    "entropy_gap": "entropy gap",
    "grad_norm": "gradient",
    "learning_rate": "lr",
}


_ROLLOUTS = 3  # shown, where `num_completions_to_print` says no other number
_TABLES = 10  # of a run, about


def show_steps(trainer: Any, table_steps: int | None = None) -> None:
    """Let a trainer of transformers print lines in place of its bar and its dictionaries; `--verbose` keeps these.

    Args:
        trainer: one of this package also prints a few rollouts every so often, and no whole ones.
        table_steps: steps between two tables of rollouts; None for a tenth of the run, 0 for no table.

    Raises:
        ValueError: `table_steps` is negative.
    """
    if table_steps is not None and table_steps < 0:
        raise ValueError(f"rollout_table_steps={table_steps} is negative; give a number of steps, or 0 for no table.")
    if os.environ.get(VERBOSE):
        return
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepLines)
    if hasattr(trainer, "table_rows"):  # a baseline of TRL's shows its table itself
        trainer.add_callback(RolloutTables(trainer, table_steps))


class StepLines(TrainerCallback):
    """Prints every log as a line, on the first process."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = self._last = (time.perf_counter(), state.global_step)
        self._tokens = state.num_input_tokens_seen  # those of a run that is resumed were not seen today

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            print(f"trained to step {state.global_step} in {duration(logs['train_runtime'])}", flush=True)
        elif "loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  {shown(logs)}  {self._times(state, logs)}", flush=True)
        else:
            print(f"evaluation at step {state.global_step}  {shown(_without_prefix(logs))}", flush=True)

    def _times(self, state, logs: Mapping[str, Any]) -> str:
        """Tokens a second and seconds a step since the last log, and what is left at the run's own pace."""
        now = (time.perf_counter(), state.global_step)
        seconds = now[0] - self._last[0]
        pace, whole = ((now[0] - before[0]) / max(1, now[1] - before[1]) for before in (self._last, self._began))
        self._last = now
        left = (state.max_steps - state.global_step) * whole
        return f"{self._speed(logs, seconds)}{pace:.1f} s a step, {duration(left)} left"

    def _speed(self, logs: Mapping[str, Any], seconds: float) -> str:
        """Prompt and completion tokens of all processes since the last log; nothing where the trainer counts none."""
        if "num_tokens" not in logs:
            return ""
        tokens, self._tokens = logs["num_tokens"] - self._tokens, logs["num_tokens"]
        return f"{tokens / max(seconds, 1e-9):.0f} tokens/s  " if tokens > 0 else ""


class RolloutTables(TrainerCallback):
    """Prints a few rollouts at the first logged step and every so many steps, on the first process."""

    def __init__(self, trainer: Any, steps: int | None):
        self.trainer, self.steps, self._last = trainer, steps, None
        self.most = _ROLLOUTS if trainer.num_completions_to_print is None else trainer.num_completions_to_print
        trainer.num_completions_to_print = 0  # whole ones are in the table's files and the trackers

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}) or not self._is_due(state):
            return
        self._last, rows = state.global_step, self.trainer.table_rows()
        rows = [rows[index] for index in spread(len(rows), self.most)]
        if rows:
            rewards = [self.trainer.reward_of_row(row) for row in rows]
            print(rollout_table(rows, rewards, shutil.get_terminal_size().columns), flush=True)

    def _is_due(self, state) -> bool:
        steps = max(1, state.max_steps // _TABLES) if self.steps is None else self.steps
        return steps > 0 and (self._last is None or state.global_step - self._last >= steps)


def shown(logs: Mapping[str, Any]) -> str:
    """The numbers of a log that a line has room for."""
    return "  ".join(f"{name} {_number(logs[key])}" for key, name in _SHOWN.items() if key in logs)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


def _without_prefix(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("eval_").removeprefix("eval/"): value for key, value in logs.items()}
