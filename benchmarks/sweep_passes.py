# SPDX-License-Identifier: Apache-2.0
"""How often the sweep of a divergence reads or writes a tile of logits: the plain form by its operations, the kernel by its loads and stores.

    TRITON_INTERPRET=1 python benchmarks/sweep_passes.py    # needs `pip install triton`; no GPU

A pass is one entry of the tile read or written once. On a GPU the plain form's operations are kernels of their own, so that their
passes go to memory and back. The kernel's are counted in Triton's interpreter. Neither is a time.
"""

import argparse
import itertools
import os
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd.losses import CLIPS, DIVERGENCES
from trl_opsd.losses.closed_form import sweep
from trl_opsd.losses.divergences import Divergence

_VIEWS = (
    "view",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "detach",
    "alias",
    "as_strided",
    "t",
    "transpose",
)


class Passes(TorchDispatchMode):
    """Within the context, entries that operations read and write of tensors as large as a tile.

    Args:
        entries: of a tile.
    """

    def __init__(self, entries: int):
        super().__init__()
        self.entries, self.moved, self.operations = entries, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        moved = sum(x.numel() for x in _tensors((args, kwargs, result)) if x.numel() == self.entries)
        if moved and name not in _VIEWS:
            self.moved, self.operations = self.moved + moved, self.operations + 1
        return result


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]


def plain_passes(rule: Divergence, shape: tuple[int, int]) -> tuple[float, int]:
    """Passes over a tile, and operations on it, of the plain sweep with its gradient."""
    student, target = torch.randn(shape), torch.randn(shape)
    with Passes(student.numel()) as counted:
        sweep(student, target, rule, with_gradient=True)
    return counted.moved / student.numel(), counted.operations


def kernel_passes(rule: Divergence, shape: tuple[int, int]) -> float:
    """Passes over a tile of the kernel with its gradient, without what its blocks mask out."""
    from triton.runtime import interpreter

    from trl_opsd.losses.sweep_kernel import sweep_by_kernel

    builder, moved = interpreter.InterpreterBuilder, 0

    def counting(method: Callable, place: int) -> Callable:
        def counted(self, *args):
            nonlocal moved
            moved += int(args[place].data.sum())
            return method(self, *args)

        return counted

    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load, builder.create_masked_store = counting(load, 1), counting(store, 2)
    try:
        student, target = torch.randn(shape), torch.randn(shape)
        sweep_by_kernel(student, target, rule, with_gradient=True, out=student)
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
    return moved / student.numel()  # statistics are stored without a mask, and not counted


def main() -> None:
    """Print a row a divergence and clip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4, 6000], metavar=("N", "V"))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1: loads are counted in the interpreter")
    print("| divergence | clip | plain: passes | operations | kernel: passes | launches |\n|---|---|---|---|---|---|")
    for name, clip in itertools.product(DIVERGENCES, CLIPS):
        rule = Divergence(name, 0.3, clip=clip, clip_value=0.05)
        passes, operations = plain_passes(rule, tuple(options.shape))
        kernel = kernel_passes(rule, tuple(options.shape))
        print(f"| {name} | {clip or '-'} | {passes:.0f} | {operations} | {kernel:.1f} | 1 |")


if __name__ == "__main__":
    main()
