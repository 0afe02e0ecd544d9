# SPDX-License-Identifier: Apache-2.0
"""The loss's products on a CPU with a GPU's numbers: inputs in bfloat16, sums in float32. For errors, not for times."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from trl_opsd.losses import fused


def _dtype_on_a_gpu(hidden: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype


def _product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype))


def _product_into(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


@contextmanager
def narrow_products() -> Iterator[None]:
    """A context in which the fused losses narrow what a GPU's would, under autocast or for a bfloat16 model."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _product, "CPU")  # of which CPUs have none
    library.impl("mm.dtype_out", _product_into, "CPU")
    try:
        with patch.object(fused, "product_dtype", _dtype_on_a_gpu):
            yield
    finally:
        library._destroy()
