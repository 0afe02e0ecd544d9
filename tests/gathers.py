# SPDX-License-Identifier: Apache-2.0
"""Makes the engines gather in a test as they do in earnest, and counts how often FSDP2 gathers the output head."""

import os

from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from trl_opsd.heads import causal_lm


def partition_small_parameters_too():
    """Have ZeRO-3 keep no parameter whole: below its threshold of 100,000 elements a test's model would never be sharded."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        DeepSpeedZeRoOffload.mark_persistent_parameters = lambda self, *thresholds: []


class HeadGathers:
    """Within the context, `count` grows with each gather of the trainer's output head by FSDP2."""

    def __init__(self, trainer):
        self.trainer, self.count = trainer, 0

    def __enter__(self):
        self._gather = _fsdp_param_group.foreach_all_gather
        _fsdp_param_group.foreach_all_gather = self._fsdp2
        return self

    def __exit__(self, *_):
        _fsdp_param_group.foreach_all_gather = self._gather

    def _head(self):
        return causal_lm(self.trainer.accelerator.unwrap_model(self.trainer.model)).get_output_embeddings()

    def _fsdp2(self, fsdp_params, *args, **kwargs):
        weight = self._head().weight
        self.count += any(param.sharded_param is weight for param in fsdp_params)
        return self._gather(fsdp_params, *args, **kwargs)
