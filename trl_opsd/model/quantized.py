# SPDX-License-Identifier: Apache-2.0
"""A base in 4 or 8 bits (bitsandbytes) with adapters in float32 over it."""

import torch
from torch import nn


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds the weights in 4 or 8 bits."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def prepare_quantized(model: nn.Module) -> None:
    """Make a quantized base one through which a gradient goes, and its adapters float32; nothing for other models.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit layer at its first forward without a gradient, which here is the
    first sampling. A repacked layer passes no gradient on, and only a warning of torch's says so.

    TRL makes the adapters bfloat16, in which a step of 5e-6 is lost on any value above 0.002, and PEFT makes them float32
    when a checkpoint is read. So a resumed run would be another one.

    Raises:
        ValueError: a layer was repacked already.
    """
    if not is_quantized(model):
        return
    for name, module in model.named_modules():
        if getattr(getattr(module, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"model: bitsandbytes has repacked {name} for inference on this CPU, and no gradient goes through it. Give the "
                "model before it has generated anything, or its name."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
