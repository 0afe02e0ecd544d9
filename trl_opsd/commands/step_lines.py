# SPDX-License-Identifier: Apache-2.0
"""A line a logged step, in place of a bar and a dictionary of all numbers.

The commands print it. A script of one's own does with `show_steps(trainer)`.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

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


def show_steps(trainer: Any) -> None:
    """Let a trainer of transformers print lines in place of its bar and its dictionaries; `--verbose` keeps these."""
    if os.environ.get(VERBOSE):
        return
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepLines)


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
