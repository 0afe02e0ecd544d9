# SPDX-License-Identifier: Apache-2.0
"""Makes the engines gather in a test as they do in earnest, and counts how often they gather the output head."""

import functools
import os

from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from trl_opsd.model.heads import causal_lm


def partition_small_parameters_too():
    """Have ZeRO-3 keep no parameter whole: below its threshold of 100,000 elements a test's model would never be sharded."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        DeepSpeedZeRoOffload.mark_persistent_parameters = lambda self, *thresholds: []


class HeadGathers:
    """Within the context, `count` grows with each gather of the trainer's output head by FSDP2 or ZeRO-3."""

    def __init__(self, trainer):
        self.trainer, self.count = trainer, 0
        self.engine = _FSDP2 if not trainer.is_deepspeed_enabled else _zero3()

    def __enter__(self):
        self.before = [getattr(owner, name) for owner, name in self.engine]
        for (owner, name), gather in zip(self.engine, self.before, strict=True):
            setattr(owner, name, self._counting(gather))
        return self

    def __exit__(self, *_):
        for (owner, name), gather in zip(self.engine, self.before, strict=True):
            setattr(owner, name, gather)

    def _counting(self, gather):
        @functools.wraps(gather)
        def counted(*args, **kwargs):
            head = causal_lm(self.trainer.accelerator.unwrap_model(self.trainer.model)).get_output_embeddings()
            # Under ZeRO-3 `head.weight` would gather it; of a head that PEFT saves the last one is the copy that trains.
            weight = [parameter for name, parameter in head.named_parameters() if name.endswith("weight")][-1]
            lists = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, (list, set, tuple))]
            self.count += any(_is_missing(param, weight) for params in lists for param in params)
            return gather(*args, **kwargs)

        return counted


_FSDP2 = [(_fsdp_param_group, "foreach_all_gather")]


def _zero3():
    """What gathers partitioned parameters: for a module that runs, and for `GatheredParameters`."""
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    return [
        (PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__all_gather_params_"),
        (Init, "_all_gather"),
    ]


def _is_missing(param, weight):
    """Whether a parameter that is asked for is the head's weight, and not whole already."""
    if getattr(param, "sharded_param", param) is not weight:
        return False
    return not hasattr(weight, "ds_status") or weight.ds_status.name == "NOT_AVAILABLE"
