# SPDX-License-Identifier: Apache-2.0
"""Every number of every log, as a line of JSON in the run's folder, at once and whatever trackers there are.

`trainer_state.json` holds the same, but is written with checkpoints only.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

NAME = "log.jsonl"


class LogFile(TrainerCallback):
    """Appends each log to `log.jsonl` of `output_dir`, on the first process.

    A run that starts anew begins the file anew, and one that is resumed takes out what was logged behind its checkpoint.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            kept = [line for line in _lines(_path(args)) if 0 < state.global_step >= _step(line)]
            _path(args).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, **logs}
            with _path(args).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(entry, default=float)}\n")


def _path(args: Any) -> Path:
    return Path(args.output_dir) / NAME


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; of one that a killed run cut off, none that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
