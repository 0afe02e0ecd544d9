# SPDX-License-Identifier: Apache-2.0
"""Where a rank's part of a parameter lies: a whole tensor, a flat shard (DeepSpeed ZeRO-3) or some of its rows (FSDP2).

An engine shards the parameters when it prepares the model, so the same parameter may be whole at first and sharded
later. FSDP2's parameter is a DTensor while it is sharded and a plain tensor from a forward that gathers it to the next
reshard; `release` brings back the sharded state.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

# What wrappers of modules (activation checkpointing, torch.compile) put into the names of the parameters below them.
_WRAPPER_NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.")


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 manages the parameter."""
    return getattr(parameter, "ds_tensor", None) is not None


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this rank holds only a part of the parameter."""
    return is_partitioned(parameter) or isinstance(parameter, DTensor)


def plain_name(name: str) -> str:
    """A parameter's name as it was before its modules were wrapped."""
    for wrapper in _WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape with the parts of all ranks."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_part(parameter: nn.Parameter) -> torch.Tensor:
    """The tensor that holds this rank's values: ZeRO-3's flat shard, FSDP2's rows, else the parameter."""
    if is_partitioned(parameter):
        return parameter.ds_tensor
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter


def release(model: nn.Module) -> None:
    """Drop gathered copies of the trainable parameters, so that the next forward gathers from the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in model.parameters():
        if parameter.requires_grad and is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def part_of(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a whole `value`, laid out as `local_part(parameter)`; a part is returned as it is."""
    own = local_part(parameter)
    if value.shape == own.shape:
        return value
    if isinstance(parameter, DTensor):
        value = value.to(own.device)
        part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        return part.clone()  # else it would keep the whole alive
    size, rank = own.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    flat = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(flat, (0, size - flat.numel())).clone()


def first_ranks(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Rank 0's `value` on the parameter's device, as every engine gives all ranks the student of rank 0; a collective.

    A part of a parameter that was sharded when it was made comes back as it is.
    """
    value = value.to(local_part(parameter).device)
    if value.shape == whole_shape(parameter) and torch.distributed.is_initialized():
        torch.distributed.broadcast(value, src=0)
    return value


def exchange(parameter: nn.Parameter, value: torch.Tensor) -> Callable[[], Any]:
    """Put `value`, laid out as `local_part(parameter)`, in the place of this rank's values.

    Returns:
        A function that puts them back.
    """
    part = local_part(parameter)
    value = value.to(dtype=part.dtype, device=part.device)
    if isinstance(parameter, DTensor):  # FSDP2 gathers from storage of its own, into which the parameter only looks
        own = part.clone()
        part.copy_(value)
        return lambda: part.copy_(own)
    own, part.data = part.data, value
    return lambda: setattr(part, "data", own)


def gathered(parameters: Sequence[torch.Tensor | None]) -> AbstractContextManager:
    """Context in which ZeRO-3's partitioned parameters among `parameters` are whole; a collective."""
    missing = [p for p in parameters if p is not None and is_partitioned(p) and p.ds_status.name != "AVAILABLE"]
    if not missing:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(missing)


def whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The values of all ranks, without a gradient for FSDP2's shards; a collective. See `gathered` for ZeRO-3."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter


def call_within(module: nn.Module, function: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
    """`function(hidden)` as the forward of `module`, so that under FSDP2 the module's parameters are whole there.

    FSDP2 gathers a module's parameters, and takes their gradients back to the shards, in hooks around a call of it.

    Args:
        module: whose `weight` the function reads, itself or through a wrapper around the module that owns it.
        function: returns a tensor, or a tuple that starts with one; only that tensor may carry a gradient.
        hidden: (..., H) the input.
    """
    weight = module.weight
    owners = [m for m in module.modules() if m is module or m._parameters.get("weight") is weight]
    for owner in reversed(owners):
        if isinstance(owner, FSDPModule):
            function = _as_forward_of(owner, function)
    return function(hidden)


def _as_forward_of(module: nn.Module, function: Callable) -> Callable:
    def call(hidden):
        result = None

        def forward(hidden):
            nonlocal result
            result = function(hidden)
            return result if isinstance(result, torch.Tensor) else result[0]

        replaced = module.__dict__.get("forward")
        module.forward = forward
        try:
            module(hidden)
        finally:
            if replaced is None:
                del module.forward
            else:
                module.forward = replaced
        return result  # not what the call returned: the hooks may have narrowed its dtype

    return call
