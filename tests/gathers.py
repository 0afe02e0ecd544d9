# SPDX-License-Identifier: Apache-2.0
"""Counts how often an engine gathers the output head during training, at the engine's own gathering calls."""

import os

from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from trl_opsd.heads import causal_lm


def partition_small_parameters_too():
    """Have ZeRO-3 keep no parameter whole: below its threshold of 100,000 elements a test's model would never be sharded."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        DeepSpeedZeRoOffload.mark_persistent_parameters = lambda self, *thresholds: []


class HeadGathers:
    """Within the context, `count` grows with each gather of the trainer's output head by ZeRO-3 or FSDP2."""

    def __init__(self, trainer):
        self.trainer, self.count = trainer, 0

    def __enter__(self):
        self._gather = _fsdp_param_group.foreach_all_gather
        _fsdp_param_group.foreach_all_gather = self._fsdp2
        if self.trainer.is_deepspeed_enabled:
            import deepspeed

            self._context, self._enter = deepspeed.zero.GatheredParameters, deepspeed.zero.GatheredParameters.__enter__
            counter, enter = self, self._enter

            def entered(self):
                parameters = getattr(self, "params", None) or []
                counter.count += any(p is counter._head().weight for p in parameters)
                return enter(self)

            self._context.__enter__ = entered
        return self

    def __exit__(self, *_):
        _fsdp_param_group.foreach_all_gather = self._gather
        if self.trainer.is_deepspeed_enabled:
            self._context.__enter__ = self._enter

    def _head(self):
        return causal_lm(self.trainer.accelerator.unwrap_model(self.trainer.model)).get_output_embeddings()

    def _fsdp2(self, fsdp_params, *args, **kwargs):
        weight = self._head().weight
        self.count += any(param.sharded_param is weight for param in fsdp_params)
        return self._gather(fsdp_params, *args, **kwargs)
