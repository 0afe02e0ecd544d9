# SPDX-License-Identifier: Apache-2.0
"""Where a rank's part of a parameter lies: a whole tensor, or a flat shard under DeepSpeed ZeRO-3."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 manages the parameter."""
    return getattr(parameter, "ds_tensor", None) is not None


def local_part(parameter: nn.Parameter) -> torch.Tensor:
    """The tensor that holds this rank's values: the flat shard under ZeRO-3, else the parameter."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter


def release(parameter: nn.Parameter) -> None:
    """Drop ZeRO-3's gathered copy, so that the next forward gathers from the shards again."""
    if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


def part_of(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a whole `value`, laid out as `local_part(parameter)`; a part is returned as it is."""
    own = local_part(parameter)
    if value.shape == own.shape:
        return value
    size, rank = own.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    flat = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(flat, (0, size - flat.numel()))


def gathered(parameters: Sequence[torch.Tensor | None]) -> AbstractContextManager:
    """Context in which ZeRO-3's partitioned parameters among `parameters` are whole; a collective."""
    missing = [p for p in parameters if p is not None and is_partitioned(p) and p.ds_status.name != "AVAILABLE"]
    if not missing:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(missing)
