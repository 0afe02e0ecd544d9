# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are whole, and what they hold beside the parent's files.

A folder is marked as being written before its first file and as complete after its last one, on all ranks. A run that
ends in between leaves a half-written checkpoint, which is skipped or refused by name. What a run is in the middle of (a
generation batch, a logging interval) is written as tensors and JSON, one pair of files a rank.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MARKER = "trl_opsd_checkpoint.json"
_STATE, _TENSORS, _HEAD = "trl_opsd_state", "trl_opsd_batch", "trl_opsd_head.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def writing_checkpoint(folder: Path, *, marks: bool, wait: Callable[[], None]) -> Iterator[None]:
    """Within the context every rank writes its files into `folder`; the folder is marked before and after.

    Args:
        folder: of the checkpoint; one that exists already counts as half-written from here on.
        marks: this rank writes the marker, once a file system.
        wait: waits for all ranks.

    Raises:
        Exception: what the writing raised, with a note that names the folder and the space left.
    """
    try:
        if marks:
            _mark(folder, complete=False)
            for leftover in folder.glob("trl_opsd_*"):
                if leftover.name != MARKER:
                    leftover.unlink()
        wait()
        yield
        wait()
        if marks:
            _mark(folder, complete=True)
    except Exception as error:
        error.add_note(_describe_failure(folder))
        raise


def complete_steps(output_dir: str | Path) -> dict[int, str]:
    """Steps of the folders `checkpoint-N`, each with its state.

    Returns:
        "complete", "half-written", or "unmarked": written without the marker, but with the file that comes last there.
    """
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        name = _NAME.fullmatch(folder.name)
        if name and folder.is_dir():
            found[int(name[1])] = checkpoint_state(folder)
    return found


def checkpoint_state(folder: str | Path) -> str:
    """ "complete", "half-written" or "unmarked"; see `complete_steps`."""
    marker = Path(folder) / MARKER
    if marker.exists():
        return "complete" if '"complete": true' in marker.read_text() else "half-written"
    return "unmarked" if (Path(folder) / "trainer_state.json").exists() else "half-written"


def latest_complete_checkpoint(
    output_dir: str | Path, tell: Callable[[str], None] = lambda text: None, common: Callable[[set], set] = set
) -> str | None:
    """The newest checkpoint of a run that can be resumed.

    Args:
        output_dir: of the run.
        tell: is given a sentence about every newer folder that is passed over, and about one without a marker.
        common: keeps, of a set of steps, those that every rank has.

    Returns:
        Its folder, or None if there is none.
    """
    found = complete_steps(output_dir)
    usable = common({step for step, state in found.items() if state != "half-written"})
    newest = max(usable, default=None)
    skipped = [step for step in sorted(found) if newest is None or step > newest]
    folders = ", ".join(str(Path(output_dir) / f"checkpoint-{step}") for step in skipped)
    if skipped:
        tell(f"Skipped, because the run ended while it was being saved: {folders}.")
    if newest is None:
        return None
    folder = str(Path(output_dir) / f"checkpoint-{newest}")
    if found[newest] == "unmarked":
        tell(f"{folder} was written without trl_opsd's marker ({MARKER}); its files look complete, so it is used.")
    return folder


def resolve_checkpoint(
    wanted: str | bool | None,
    output_dir: str,
    tell: Callable[[str], None] = lambda text: None,
    common: Callable[[set], set] = set,
) -> str | None:
    """The folder to resume from, from what a user gave as `resume_from_checkpoint`.

    Args:
        wanted: a folder; True, or "true" as a command line gives it, for the newest complete one; False or None.
        output_dir: of the run.
        tell: see `latest_complete_checkpoint`.
        common: see `latest_complete_checkpoint`.

    Raises:
        ValueError: there is no complete checkpoint, or the folder given is half-written.
    """
    if isinstance(wanted, str) and wanted.lower() in ("true", "false"):
        wanted = wanted.lower() == "true"
    if not wanted:
        return None
    if wanted is True:
        folder = latest_complete_checkpoint(output_dir, tell, common)
        if folder is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {output_dir} holds no complete checkpoint. Leave it out to start "
                "from the beginning, or set output_dir to the folder of the run."
            )
        return folder
    if Path(wanted).is_dir() and checkpoint_state(wanted) == "half-written":
        other = latest_complete_checkpoint(Path(wanted).parent)
        advice = f"Give {other}, the newest complete one" if other else "There is no complete one beside it: start anew"
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is half-written: the run ended while it was being saved. {advice}."
        )
    return str(wanted)


def save_state(
    folder: str | Path, rank: int, world: int, values: dict[str, Any], batches: list[Mapping[str, Any] | None]
) -> None:
    """Write what one rank is in the middle of.

    Args:
        folder: of the checkpoint.
        rank: of this process.
        world: number of processes.
        values: anything JSON holds.
        batches: micro-batches still to come, None for those done; of tensors, and of what JSON holds.
    """
    tensors, others = {}, []
    for index, batch in enumerate(batches):
        others.append(None if batch is None else {k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)})
        for name, value in (batch or {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{name}"] = value.detach().cpu().clone().contiguous()
    if tensors:
        save_file(tensors, _own(folder, _TENSORS, rank, world, "safetensors"))
    text = json.dumps({"values": values, "batches": others}, default=float)
    _own(folder, _STATE, rank, world, "json").write_text(text)


def load_state(folder: str | Path, rank: int, world: int, device: torch.device) -> tuple[dict[str, Any], list] | None:
    """Read what `save_state` wrote; None where the checkpoint has no such file for this rank and number of ranks."""
    file = _own(folder, _STATE, rank, world, "json")
    if not file.exists():
        return None
    state = json.loads(file.read_text())
    batches = state["batches"]
    if any(batch is not None for batch in batches):
        for key, value in load_file(_own(folder, _TENSORS, rank, world, "safetensors")).items():
            index, name = key.split("/", 1)
            batches[int(index)][name] = value.to(device)
    return state["values"], batches


def save_head(folder: str | Path, fields: Mapping[str, torch.Tensor | float | None]) -> None:
    """Write the fields of a teacher's output head that no longer is any module's, one that is None left out."""
    tensors = {name: torch.as_tensor(value) for name, value in fields.items() if value is not None}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, Path(folder) / _HEAD)


def load_head(folder: str | Path, device: torch.device) -> dict[str, torch.Tensor | float] | None:
    """Read what `save_head` wrote; None where there is no head."""
    file = Path(folder) / _HEAD
    if not file.exists():
        return None
    return {name: value.to(device) if value.ndim else value.item() for name, value in load_file(file).items()}


def fingerprint(values: Mapping[str, torch.Tensor]) -> str:
    """A hash of about 256 numbers of each tensor: tells models apart that a training step lies between."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name].detach()
        value = (value.to_local() if hasattr(value, "to_local") else value).flatten()
        sample = value[:: max(1, value.numel() // 256)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _own(folder: str | Path, name: str, rank: int, world: int, ending: str) -> Path:
    return Path(folder) / f"{name}-{rank:05d}-of-{world:05d}.{ending}"


def _mark(folder: Path, *, complete: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{MARKER}.new"
    unfinished.write_text(json.dumps({"complete": complete}))
    os.replace(unfinished, folder / MARKER)  # never half a marker


def _describe_failure(folder: Path) -> str:
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    kept = latest_complete_checkpoint(folder.parent) if folder.parent.exists() else None
    return (
        f"This happened while {folder} was being saved ({shutil.disk_usage(parent).free / 2**20:,.0f} MiB are free "
        f"there). The folder is half-written and resume_from_checkpoint=True skips it; the newest complete checkpoint "
        f"is {kept}. Free space, or set save_total_limit or another output_dir."
    )
