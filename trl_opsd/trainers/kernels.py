# SPDX-License-Identifier: Apache-2.0
"""Liger's kernels of single layers, which leave the model's forward as it is; those that replace it are refused."""

from typing import Any

import torch
from transformers.utils import is_liger_kernel_available

from .._trl.versions import liger_enters_loss

_FORWARD = "fused_linear_cross_entropy"  # Liger's default, which puts another forward in the place of the model's


def prepare_layer_kernels(args: Any) -> None:
    """Let `use_liger_kernel` replace layers alone: norms, rotary angles and MLPs, which the teacher's forwards then use too.

    transformers puts the kernels into the model when training begins. The forward that Liger would put in with them gives no
    hidden states to the loss, so it is switched off in `args.liger_kernel_config`.

    Raises:
        ValueError: the forward is asked for; this TRL takes a loss of Liger's own; Liger is not installed; or there is no GPU.
    """
    if not args.use_liger_kernel:
        return
    config = args.liger_kernel_config or {}
    if config.get(_FORWARD):
        raise ValueError(
            f"liger_kernel_config: {_FORWARD}=True replaces the model's forward, within which the token-level loss reads "
            "hidden states. Leave it out: the loss here makes no logits of a batch either, and Liger's other kernels stay."
        )
    if liger_enters_loss():
        raise ValueError(
            "use_liger_kernel=True: before TRL 1.16 it also replaces GRPO's loss, which this trainer extends. Install "
            "`pip install 'trl>=1.16,<2'`, or leave it out."
        )
    if not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel=True, but liger-kernel is not installed. Run `pip install liger-kernel`, or leave it out."
        )
    if not _has_gpu(args):
        raise ValueError(
            "use_liger_kernel=True without a GPU: Liger's kernels are Triton's, which run on none but GPUs. Leave it out."
        )
    args.liger_kernel_config = {**config, _FORWARD: False}


def _has_gpu(args: Any) -> bool:
    return torch.accelerator.is_available() and not args.use_cpu
