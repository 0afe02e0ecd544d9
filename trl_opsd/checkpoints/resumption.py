# SPDX-License-Identifier: Apache-2.0
"""From which checkpoint a run goes on: the newest whole one of one run, the same on every rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .manifest import MARKER, Checkpoint, find_faults, read_checkpoint, read_checkpoints

_ANY_RUN = object()


@dataclass(frozen=True)
class CheckpointSearch:
    """Looks for a checkpoint to resume from; every rank calls the same methods and gets the same answers.

    Args:
        tell: is given a sentence about what is passed over or cannot be checked.
        of_all: from a rank's value, the list of all ranks' values, the first rank's first; a collective.
        reads: this rank looks at the files, once a machine.
    """

    tell: Callable[[str], None] = lambda text: None
    of_all: Callable[[Any], list] = lambda value: [value]
    reads: bool = True

    def resolve(self, wanted: str | bool | None, output_dir: str | Path) -> str | None:
        """The folder to resume from, from what a user gave as `resume_from_checkpoint`.

        Args:
            wanted: a folder; True, or "true" as a command line gives it, for the newest whole one; False or None.
            output_dir: of the run.

        Raises:
            ValueError: there is no whole checkpoint, or the folder given is half-written or damaged; names each file.
        """
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):
            wanted = wanted.lower() == "true"
        if not wanted:
            return None
        if wanted is True:
            return self._newest_of(output_dir)
        if any(self.of_all(Path(wanted).is_dir())):  # one that is nowhere is refused by HF Trainer
            self._check_given(wanted)
        return str(wanted)

    def newest(self, output_dir: str | Path, run: Any = _ANY_RUN) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose files are as they were saved, and what is wrong with those passed over.

        Args:
            output_dir: holds `checkpoint-N`.
            run: whose; of the run that wrote the last one if not given. Runs are never mixed.
        """
        found = {each.folder.name: each for each in read_checkpoints(output_dir) if each.can_resume}
        if run is _ANY_RUN and found:
            run = list(found.values())[-1].run
        names = [name for name, checkpoint in reversed(found.items()) if checkpoint.run == run]
        # On folders that are not shared, one may hold what another does not; the first rank's order counts.
        shared = set.intersection(*self.of_all(set(found)))
        faults = []
        for name in self.of_all(names)[0]:
            if name in shared:
                of_this = self._faults(found[name])
                if not of_this:
                    return found[name], faults
                faults += of_this
        return None, faults

    def _faults(self, checkpoint: Checkpoint) -> list[str]:
        own = find_faults(checkpoint) if self.reads else []
        return list(dict.fromkeys(chain.from_iterable(self.of_all(own))))

    def _newest_of(self, output_dir: str | Path) -> str:
        checkpoint, faults = self.newest(output_dir)
        self._tell_of_half_written(output_dir, checkpoint)
        if checkpoint is None:
            why = f" ({_sentence(faults)})" if faults else ""
            raise ValueError(
                f"resume_from_checkpoint=True, but {output_dir} holds no complete checkpoint{why}. Leave it out to start "
                "from the beginning, or set output_dir to the folder of the run."
            )
        if faults:
            self.tell(f"Skipped newer checkpoints for {checkpoint.folder}: {_sentence(faults)}.")
        self._tell_of_checkpoint(checkpoint)
        return str(checkpoint.folder)

    def _check_given(self, wanted: str) -> None:
        checkpoint = read_checkpoint(wanted)
        faults = self._faults(checkpoint)
        if not faults:
            self._tell_of_checkpoint(checkpoint)
            return
        other, _ = self.newest(checkpoint.folder.parent, *[checkpoint.run] if checkpoint.run else [])
        advice = (
            f"Give {other.folder}, the newest complete one"
            if other
            else "There is no complete one beside it: start anew"
        )
        way_out = f" Whoever changed it on purpose deletes {MARKER} there: then nothing is checked."
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} cannot be used: {_sentence(faults)}. {advice}."
            + (way_out if checkpoint.files is not None else "")
        )

    def _tell_of_half_written(self, output_dir: str | Path, checkpoint: Checkpoint | None) -> None:
        half = [each for each in read_checkpoints(output_dir) if not each.can_resume]
        newer = [each.folder for each in half if checkpoint is None or each.step > checkpoint.step]
        if newer:
            folders = ", ".join(map(str, sorted(newer, key=lambda folder: read_checkpoint(folder).step)))
            self.tell(f"Skipped, because the run ended while it was being saved: {folders}.")

    def _tell_of_checkpoint(self, checkpoint: Checkpoint) -> None:
        others = [
            each.folder.name
            for each in read_checkpoints(checkpoint.folder.parent)
            if each.can_resume and None not in (each.run, checkpoint.run) and each.run != checkpoint.run
        ]
        if others:
            self.tell(
                f"{checkpoint.folder.parent} also holds checkpoints of another run, which are left alone: {', '.join(others)}."
            )
        if checkpoint.files is not None and not any("optim" in name for name in checkpoint.files):
            self.tell(
                f"{checkpoint.folder} was saved without its optimizer (save_only_model): optimizer, learning rate and "
                "random numbers start anew, so the run is not the uninterrupted one."
            )
        if checkpoint.files is None:
            marker = f"trl_opsd's marker ({MARKER})" if checkpoint.state == "unmarked" else "a list of its files"
            self.tell(
                f"{checkpoint.folder} was written without {marker}; its files can be opened, so it is used, but nothing "
                "shows whether one is missing or altered."
            )


def _sentence(faults: Sequence[str]) -> str:
    """All of a few, the first of many."""
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
