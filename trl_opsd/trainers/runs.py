# SPDX-License-Identifier: Apache-2.0
"""A run has an id, its folder for itself, and goes on from checkpoints that are whole and its own."""

import uuid
import warnings

from accelerate.utils import gather_object

from .._trl.checkpoints import CheckedCheckpoints
from ..checkpoints.initial_weights import check_initial_weights, hash_initial_weights
from ..checkpoints.lock import only_run_in
from ..checkpoints.manifest import read_checkpoint, read_checkpoints
from ..checkpoints.resumption import CheckpointSearch
from .checks import check_fills_a_batch, check_trained


class IdentifiedRun(CheckedCheckpoints):
    """Mixin in front of one of TRL's trainers, whose `args` are `SelfDistillationSettings` and that has a `teacher`."""

    own_run_ids: frozenset[str] = frozenset()  # one for each call of `train`

    def remember_initial_weights(self) -> None:
        """Hash what a checkpoint does not hold of the model as it was given; a collective."""
        taught = self.teacher.values if self.teacher.kind == "base" else ()
        hashes = hash_initial_weights(
            self.model, taught, hashes=self.args.checkpoint_hashes, counts=self.accelerator.is_main_process
        )
        self.initial_weights = _of_all(hashes)[0]

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
        check_fills_a_batch(self.args, self.train_dataset)
        takes = self.accelerator.is_main_process
        with only_run_in(self.args.output_dir, takes=takes, of_all=_of_all, tell=self._tell):
            search = CheckpointSearch(
                tell=self._tell,
                of_all=_of_all,
                reads=self.accelerator.is_local_main_process,
                hashes=self.args.checkpoint_hashes,
            )
            folder = search.resolve(resume_from_checkpoint, self.args.output_dir)
            self._identify_run(folder)
            output = super().train(folder, *args, **kwargs)
        check_trained(self.state)
        return output

    def _identify_run(self, folder: str | None) -> None:
        """Take over the id of the run that is resumed, or make one and see that no other run's checkpoints are there."""
        checkpoint = None if folder is None else read_checkpoint(folder)
        if checkpoint is not None and checkpoint.initial_weights is not None:
            check_initial_weights(self.initial_weights, checkpoint.initial_weights)
        if checkpoint is None and self.args.save_strategy != "no":
            self._look_for_others()
        own = checkpoint.run if checkpoint is not None else None
        self.run_id = _of_all(own or uuid.uuid4().hex)[0]
        self.own_run_ids |= {self.run_id}

    def _look_for_others(self) -> None:
        found = [each for each in read_checkpoints(self.args.output_dir) if each.can_resume]
        found = _of_all([(each.folder.name, each.run) for each in found])[0]
        others = [name for name, run in found if run not in self.own_run_ids]
        if others and not self.args.overwrite_output_dir:
            raise ValueError(
                f"output_dir={self.args.output_dir!r} holds checkpoints of another run ({', '.join(others)}), and this one "
                "starts from the beginning: the two would be mixed. To go on from them call "
                "train(resume_from_checkpoint=True) (--resume_from_checkpoint true); otherwise set another output_dir, "
                "move them away, or set overwrite_output_dir=True, which leaves them until a step of the same number is saved."
            )
        if found:
            self._tell(
                f"output_dir={self.args.output_dir!r} holds checkpoints from before this start "
                f"({', '.join(name for name, _ in found)}). Each stays until a step of its number is saved."
            )

    def _tell(self, text: str) -> None:
        if self.is_world_process_zero():
            warnings.warn(text, stacklevel=4)


def _of_all(value) -> list:
    """The values of all ranks: on folders that are not shared, one may find what another does not."""
    return gather_object([value])
