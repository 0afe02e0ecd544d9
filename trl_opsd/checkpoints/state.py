# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds beside the parent's files: what a run is in the middle of.

A generation batch and a logging interval, written as tensors and JSON, one pair of files a rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_STATE, _TENSORS, _HEAD = "trl_opsd_state", "trl_opsd_batch", "trl_opsd_head.safetensors"


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


def saved_memory(folder: str | Path) -> dict[str, Any] | None:
    """What the method remembered where a checkpoint was written, the same on every rank; None where it does not say."""
    file = next(iter(sorted(Path(folder).glob(f"{_STATE}-*.json"))), None)
    return None if file is None else json.loads(file.read_text())["values"].get("own", {}).get("memory")


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


def _own(folder: str | Path, name: str, rank: int, world: int, ending: str) -> Path:
    return Path(folder) / f"{name}-{rank:05d}-of-{world:05d}.{ending}"
