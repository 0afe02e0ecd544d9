# SPDX-License-Identifier: Apache-2.0
"""Tensors that say they are on a GPU and hold no values: every operation's devices, dtypes and shapes are checked as
there, and one that asks for a value fails. For a torch that was built without CUDA."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_", "addmv", "addmv_")


class _Shortcuts(TorchFunctionMode):
    """Has some operations run as others that check as much: torch's own ask the CUDA it was built with."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _OTHERS.get(function, function)(*args, **(kwargs or {}))


def _index(tensor, key):
    axis = 0
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            tensor, axis = torch.ops.aten.select.int(tensor, axis, part), axis - 1
        elif part is Ellipsis:
            axis = tensor.ndim - len(key)
        else:
            tensor = torch.ops.aten.index.Tensor(tensor, [None] * axis + [part])
        axis += 1
    return tensor


def _to(tensor, target, **kwargs):
    if isinstance(target, torch.device) and target.type != tensor.device.type:
        return torch.ops.aten._to_copy.default(tensor, device=target)
    return tensor.to(target, **kwargs)


_OTHERS = {
    torch.Tensor.__getitem__: _index,
    torch.Tensor.__invert__: torch.logical_not,
    torch.Tensor.to: _to,
    torch.Tensor.copy_: lambda tensor, source: tensor.zero_().add_(source),
}


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            a, b = args[:2] if name == "mm" else args[1:3]
            assert a.dtype == b.dtype
            self.dtypes.add((a.dtype, result.dtype))
        return result


@contextmanager
def fake_cuda(autocast: torch.dtype | None = None) -> Iterator[set[tuple[torch.dtype, torch.dtype]]]:
    """A context in which `device="cuda"` makes tensors without values; gives (inputs, result) dtypes of all products."""
    products, before = _Products(), torch.get_autocast_dtype("cuda")
    with ExitStack() as stack:
        for context in (FakeTensorMode(), _Shortcuts(), products):
            stack.enter_context(context)
        if autocast is not None:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", autocast)
        try:
            yield products.dtypes
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
