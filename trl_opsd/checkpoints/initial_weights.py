# SPDX-License-Identifier: Apache-2.0
"""Hashes of the weights that a checkpoint does not hold, which a resumed run must be given again."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..model.sharding import gathered, plain_name, whole

_CHUNK = 2**26  # values copied to the host at once


def hash_initial_weights(model: nn.Module, taught: Collection[str], *, counts: bool = True) -> dict[str, str] | None:
    """Hash what has to be the run's initial model; a collective where an engine shards it.

    Args:
        model: as it was given, before the first step.
        taught: names of the trained parameters whose initial values the teacher has.
        counts: this rank hashes; others only help to gather.

    Returns:
        "sha256" of all values and "sample" of about 256 of each tensor; the same for every engine and number of ranks. None on other ranks.
    """
    sample, full = hashlib.sha256(), hashlib.sha256()
    for name, value in _initial_values(model, taught):
        if counts:
            flat = value.detach().reshape(-1)
            label = f"{name} {tuple(value.shape)} {value.dtype}".encode()
            sample.update(label)
            sample.update(_bytes(flat[:: max(1, flat.numel() // 256)]))
            full.update(label)
            for chunk in flat.split(_CHUNK) if flat.numel() else ():
                full.update(_bytes(chunk))
    if not counts:
        return None
    return {"sample": sample.hexdigest(), "sha256": full.hexdigest()}


def check_initial_weights(own: Mapping[str, str], of_run: Mapping[str, str]) -> None:
    """Check that a resumed run was given the model that it started from.

    Raises:
        ValueError: it was another one.
    """
    if any(own[kind] != of_run[kind] for kind in own.keys() & of_run.keys()):
        raise ValueError(
            "model: the one given to the trainer has other weights than the one the run started from, or the same in "
            "another dtype, and a checkpoint does not hold them: teacher_model_kind='base' would teach from other weights, "
            "and an adapter would stand on others. Give the original model; the checkpoint's weights are loaded over it. If "
            "they differ by rounding alone, as where an adapter's initialisation is computed anew, delete "
            "trl_opsd_checkpoint.json in the checkpoint: then nothing of it is checked."
        )


def fingerprint(values: Mapping[str, torch.Tensor]) -> str:
    """A hash of about 256 numbers of each tensor, as state files held it before markers held `hash_initial_weights`."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name].detach()
        value = (value.to_local() if hasattr(value, "to_local") else value).flatten()
        sample = value[:: max(1, value.numel() // 256)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _initial_values(model: nn.Module, taught: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """What the teacher keeps, and the layers below an adapter, whole."""
    is_adapted = hasattr(model, "peft_config")
    for name, parameter in sorted((plain_name(name), parameter) for name, parameter in model.named_parameters()):
        if name in taught or (is_adapted and not parameter.requires_grad):
            with gathered([parameter]):
                yield name, whole(parameter)


def _bytes(values: torch.Tensor) -> Any:
    return values.detach().cpu().contiguous().view(torch.uint8).numpy()
