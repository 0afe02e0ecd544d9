# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are whole, and whose they are.

A folder is marked as being written before its first file and as complete after its last one, on all ranks. The mark of
a complete one lists its files with size and hash, and the run that wrote them: what is missing, cut or altered later is
found by name, and two runs in one folder are told apart.
"""

import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

MARKER = "trl_opsd_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_READERS = 4  # files hashed at once; hashlib and the disk leave the interpreter free


@dataclass(frozen=True)
class Checkpoint:
    """A folder as its marker describes it."""

    folder: Path
    state: str  # "complete", "half-written", or "unmarked": no marker, but the file that comes last there
    run: str | None = None  # that wrote it; None before there were ids
    written: float = 0.0  # seconds since the epoch
    initial_weights: dict[str, str] | None = None  # hashes, see `initial_weights`
    files: dict[str, list] | None = None  # name in the folder -> size in bytes and SHA-256 or None; None: no list
    unread: str | None = None  # why its marker cannot be read

    @property
    def can_resume(self) -> bool:
        """Whether it claims to be whole."""
        return self.state != "half-written"

    @property
    def step(self) -> int:
        """N of `checkpoint-N`, -1 for another name."""
        name = _NAME.fullmatch(self.folder.name)
        return int(name[1]) if name else -1


@contextmanager
def writing_checkpoint(
    folder: Path,
    *,
    marks: bool,
    wait: Callable[[], None],
    run: str | None = None,
    initial_weights: dict[str, str] | None = None,
) -> Iterator[None]:
    """Within the context every rank writes its files into `folder`; the folder is marked before and after.

    Args:
        folder: of the checkpoint; what an earlier one of its name holds is removed first.
        marks: this rank writes the marker, once a file system.
        wait: waits for all ranks.
        run: id of the run.
        initial_weights: hashes that the run's start has to have when it is resumed.

    Raises:
        Exception: what the writing raised, with a note that names the folder and the space left.
    """
    facts = {"run": run, "initial_weights": initial_weights}
    try:
        if marks:
            shutil.rmtree(folder, ignore_errors=True)  # files of another run or of other ranks must not mix with these
            _mark(folder, complete=False, **facts)
        wait()
        yield
        wait()
        if marks:
            _mark(folder, complete=True, **facts, files=_list_files(folder))
    except Exception as error:
        error.add_note(_describe_failure(folder))
        raise


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What the marker of a folder says."""
    folder, values = Path(folder), None
    marker = folder / MARKER
    if not marker.exists():
        return Checkpoint(folder, "unmarked" if (folder / "trainer_state.json").exists() else "half-written")
    try:
        values = json.loads(marker.read_text(encoding="utf-8"))
        state = "complete" if values.pop("complete") else "half-written"
        return Checkpoint(folder, state, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Checkpoint(folder, "half-written", unread=f"{marker} cannot be read ({error})")


def read_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """The folders `checkpoint-N` of a run, in the order in which they were written."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    # By their own clock: copying changes a folder's, and a later run may be at an earlier step.
    return sorted(map(read_checkpoint, folders), key=lambda checkpoint: (checkpoint.written, checkpoint.step))


def complete_steps(output_dir: str | Path) -> dict[int, str]:
    """Steps of the folders `checkpoint-N`, each with its state; see `Checkpoint`."""
    return {checkpoint.step: checkpoint.state for checkpoint in read_checkpoints(output_dir)}


def checkpoint_state(folder: str | Path) -> str:
    """ "complete", "half-written" or "unmarked"; see `Checkpoint`."""
    return read_checkpoint(folder).state


def latest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The folder of the newest checkpoint by its marker's word, or None; its files are not looked at."""
    return next((str(each.folder) for each in reversed(read_checkpoints(output_dir)) if each.can_resume), None)


def find_faults(checkpoint: Checkpoint) -> list[str]:
    """What keeps a run from going on from a checkpoint, a sentence for each file; nothing where it is whole.

    Args:
        checkpoint: to look at. Without a list of files it is only seen whether each of them can be opened.
    """
    if checkpoint.unread:
        return [checkpoint.unread]
    if not checkpoint.can_resume:
        return [f"{checkpoint.folder} is half-written: the run ended while it was being saved"]
    if checkpoint.files is None:
        look = [partial(_fault_of_opening, path) for path in sorted(checkpoint.folder.rglob("*")) if path.is_file()]
    else:
        look = [
            partial(_fault_of_file, checkpoint.folder / name, size, digest)
            for name, (size, digest) in checkpoint.files.items()
        ]
    with ThreadPoolExecutor(_READERS) as pool:
        return [fault for fault in pool.map(lambda function: function(), look) if fault]


def remove_older(output_dir: str | Path, limit: int | None, run: str, best: str | None) -> None:
    """Remove a run's oldest checkpoints beyond `limit`; never its newest, the best one, or those of another run."""
    own = [checkpoint.folder for checkpoint in read_checkpoints(output_dir) if checkpoint.run == run]
    if limit is None or limit <= 0 or not own:
        return
    kept = {own[-1].resolve()} | ({Path(best).resolve()} if best else set())
    removable = [folder for folder in own if folder.resolve() not in kept]
    for folder in removable[: max(0, len(own) - max(limit, len(kept)))]:
        shutil.rmtree(folder, ignore_errors=True)


def _mark(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{MARKER}.new"
    unfinished.write_text(json.dumps({**values, "written": time.time()}, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / MARKER)  # never half a marker


def _list_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Of every file that a resume may read; cards are left out, as they are written again later."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if path.suffix != ".md" and not path.name.startswith(MARKER)]
    with ThreadPoolExecutor(_READERS) as pool:
        digests = list(pool.map(_digest, paths))
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, digest)
        for path, digest in zip(paths, digests, strict=True)
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault_of_file(path: Path, size: int, digest: str | None) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path} has {found:,} bytes instead of {size:,}: it was cut or replaced"
        if digest is not None and _digest(path) != digest:
            return f"{path} was altered after it was saved (its SHA-256 is not the one in {MARKER})"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def _fault_of_opening(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            raise ValueError("its end is missing")
    except Exception as error:
        return f"{path} cannot be read ({error})"
    return None


def _describe_failure(folder: Path) -> str:
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    kept = latest_complete_checkpoint(folder.parent) if folder.parent.exists() else None
    return (
        f"This happened while {folder} was being saved ({shutil.disk_usage(parent).free / 2**20:,.0f} MiB are free "
        f"there). The folder is half-written and resume_from_checkpoint=True skips it; the newest complete checkpoint "
        f"is {kept}. Free space, or set save_total_limit or another output_dir."
    )
