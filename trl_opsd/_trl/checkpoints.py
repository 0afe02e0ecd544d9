# SPDX-License-Identifier: Apache-2.0
"""TRL's checkpoints: written whole, with the batch that is pending, and resumed where they stopped."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.manifest import remove_older, writing_checkpoint


class _LaterLimit(int):
    """A number of checkpoints to keep that removes none yet; it is saved as the plain number."""

    def __le__(self, other: Any) -> bool:
        return True

    def __reduce__(self) -> tuple:
        return int, (int(self),)


class CheckedCheckpoints:
    """Mixin in front of one of TRL's trainers: a checkpoint is marked, listed and pushed when all of it is there."""

    run_id = ""
    initial_weights: dict[str, str] | None = None
    _unpushed: str | None = None

    # Hooks

    def save_extra_state(self, checkpoint: str) -> None:
        """Write what the parent does not save, into a checkpoint folder; called on every process."""

    def load_extra_state(self, checkpoint: str) -> None:
        """Read it back when a run is resumed."""

    # TRL's seams

    def _save_checkpoint(self, model, trial):
        args, run = self.args, Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self._unpushed = args.save_total_limit, None
        args.save_total_limit = None if limit is None else _LaterLimit(limit)
        try:
            with writing_checkpoint(
                folder,
                marks=args.should_save,
                wait=self.accelerator.wait_for_everyone,
                run=self.run_id,
                initial_weights=self.initial_weights,
                hashes=args.checkpoint_hashes,
            ):
                super()._save_checkpoint(model, trial)
                self.save_extra_state(str(folder))
                if not args.save_only_model:
                    self._save_pending(folder)
        finally:
            args.save_total_limit = limit
        # Not before the new one is complete: with a limit of 1 there would be none for a while.
        if args.should_save:
            remove_older(run, limit, self.run_id, self.state.best_model_checkpoint)
        if self._unpushed is not None:
            super()._push_from_checkpoint(self._unpushed)

    def _push_from_checkpoint(self, checkpoint_folder):
        self._unpushed = checkpoint_folder  # with our files and the mark that it is complete

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extra_state(checkpoint)
            self._load_pending(checkpoint)

    def _save_pending(self, folder: Path) -> None:
        """Write what this rank is in the middle of; nothing for a trainer that keeps nothing between steps."""

    def _load_pending(self, checkpoint: str) -> None:
        """Read it back."""
