# SPDX-License-Identifier: Apache-2.0
"""A run: its id, its folder for itself, and the checkpoints it may go on from, which are whole and its own."""

import uuid
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from .initial_weights import check_initial_weights, hash_initial_weights
from .lock import only_run_in
from .manifest import read_checkpoint, read_checkpoints
from .resumption import CheckpointSearch


class Run:
    """What a trainer holds of its run.

    Args:
        args: training arguments.
        accelerator: of the trainer.

    Attributes:
        id: of the run that goes on; empty before it starts.
        own_ids: one for each start.
        initial_weights: hashes of what a checkpoint does not hold of the model as it was given, or None.
    """

    def __init__(self, args: Any, accelerator: Any):
        self._args, self._accelerator = args, accelerator
        self.id, self.own_ids = "", frozenset()
        self.initial_weights: dict[str, str] | None = None

    def remember_weights(self, model: torch.nn.Module, taught: Collection[str]) -> None:
        """Hash what a checkpoint does not hold of the model as it was given; a collective.

        Args:
            model: as it was given.
            taught: names of the trained parameters whose first values the teacher keeps.
        """
        counts = self._accelerator.is_main_process
        self.initial_weights = _of_all(hash_initial_weights(model, taught, counts=counts))[0]

    @contextmanager
    def started(self, resume_from_checkpoint: str | bool | None) -> Iterator[str | None]:
        """Within the context the run has its folder for itself; gives the checkpoint that it goes on from, if any.

        Raises:
            ValueError: another run trains into `output_dir` or has left checkpoints there; there is no whole checkpoint, or
                the one given is damaged or of another model.
        """
        takes = self._accelerator.is_main_process
        with only_run_in(self._args.output_dir, takes=takes, of_all=_of_all, tell=self.tell):
            reads = self._accelerator.is_local_main_process
            search = CheckpointSearch(tell=self.tell, of_all=_of_all, reads=reads)
            folder = search.resolve(resume_from_checkpoint, self._args.output_dir)
            self._identify(folder)
            yield folder

    def _identify(self, folder: str | None) -> None:
        """Take over the id of the run that is resumed, or make one and see that no other run's checkpoints are there."""
        checkpoint = None if folder is None else read_checkpoint(folder)
        if checkpoint is not None and checkpoint.initial_weights is not None:
            check_initial_weights(self.initial_weights, checkpoint.initial_weights)
        if checkpoint is None and self._args.save_strategy != "no":
            self._look_for_others()
        own = checkpoint.run if checkpoint is not None else None
        self.id = _of_all(own or uuid.uuid4().hex)[0]
        self.own_ids |= {self.id}

    def _look_for_others(self) -> None:
        folder = self._args.output_dir
        found = [each for each in read_checkpoints(folder) if each.can_resume]
        found = _of_all([(each.folder.name, each.run) for each in found])[0]
        others = [name for name, run in found if run not in self.own_ids]
        if others:
            raise ValueError(
                f"output_dir={folder!r} holds checkpoints of another run ({', '.join(others)}), and this one "
                "starts from the beginning: the two would be mixed. To go on from them call "
                "train(resume_from_checkpoint=True) (--resume_from_checkpoint true); otherwise set another output_dir, "
                "or move or delete them."
            )
        if found:
            self.tell(
                f"output_dir={folder!r} holds checkpoints from before this start "
                f"({', '.join(name for name, _ in found)}). Each stays until a step of its number is saved."
            )

    def tell(self, text: str) -> None:
        """Warn, once for all ranks."""
        if self._accelerator.is_main_process:
            warnings.warn(text, stacklevel=5)


def _of_all(value: Any) -> list:
    """The values of all ranks: on folders that are not shared, one may find what another does not."""
    return gather_object([value])
