# SPDX-License-Identifier: Apache-2.0
"""TRL's checkpoints: written whole, with the batch that is pending, and resumed where they stopped."""

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.manifest import remove_older, writing_checkpoint
from ..checkpoints.run import Run


class _LaterLimit(int):
    """A number of checkpoints to keep that removes none yet; it is saved as the plain number."""

    def __le__(self, other: Any) -> bool:
        return True

    def __reduce__(self) -> tuple:
        return int, (int(self),)


class CheckedTrainer(Trainer):
    """In front of one of TRL's trainers: its run has an id and its folder for itself, and a checkpoint is marked, listed and
    pushed when all of it is there."""

    def __init__(self, *args, **kwargs):
        self._unpushed: str | None = None
        super().__init__(*args, **kwargs)
        self.run = Run(self.args, self.accelerator)

    # Hooks

    def check_before_training(self) -> None:
        """Refuse to train what would not be trained."""

    def save_extra_state(self, checkpoint: str) -> None:
        """Write what the parent does not save, into a checkpoint folder; called on every process."""

    def load_extra_state(self, checkpoint: str) -> None:
        """Read it back when a run is resumed."""

    def save_pending(self, checkpoint: Path) -> None:
        """Write what this rank is in the middle of; nothing for a trainer that keeps nothing between steps."""

    def load_pending(self, checkpoint: str) -> None:
        """Read it back."""

    # TRL's seams

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as TRL does; a run resumes from whole checkpoints only, and has its output folder for itself.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of `output_dir`.
            *args: TRL's.
            **kwargs: TRL's.

        Raises:
            ValueError: the dataset has too few rows for a step; another run trains into `output_dir` or has left
                checkpoints there; there is no whole checkpoint, or the one given is damaged or of another model.
        """
        self.check_before_training()
        with self.run.started(resume_from_checkpoint) as folder:
            return super().train(folder, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """The parent's optimizer without empty parameter groups (LoRA trains no bias or norm), on which DeepSpeed with
        torch 2.13 is reported to fail."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save_checkpoint(self, model, trial):
        args, folder_of_run = self.args, Path(self._get_output_dir(trial=trial))
        folder = folder_of_run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self._unpushed = args.save_total_limit, None
        args.save_total_limit = None if limit is None else _LaterLimit(limit)
        try:
            with writing_checkpoint(
                folder,
                marks=args.should_save,
                wait=self.accelerator.wait_for_everyone,
                run=self.run.id,
                initial_weights=self.run.initial_weights,
            ):
                super()._save_checkpoint(model, trial)
                self.save_extra_state(str(folder))
                if not args.save_only_model:
                    self.save_pending(folder)
        finally:
            args.save_total_limit = limit
        # Not before the new one is complete: with a limit of 1 there would be none for a while.
        if args.should_save:
            remove_older(folder_of_run, limit, self.run.id, self.state.best_model_checkpoint)
        if self._unpushed is not None:
            super()._push_from_checkpoint(self._unpushed)

    def _push_from_checkpoint(self, checkpoint_folder):
        self._unpushed = checkpoint_folder  # with our files and the mark that it is complete

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extra_state(checkpoint)
            self.load_pending(checkpoint)
