# SPDX-License-Identifier: Apache-2.0
"""Lets accelerate run FSDP2 over CPU processes and gloo, for tests: torch can, accelerate's state only asks for a GPU.

What is changed is one decision of `AcceleratorState`; preparing, clipping, saving and loading are accelerate's own.
"""

import os

if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # which it would switch off
    os.environ["ACCELERATE_USE_CPU"] = "true"

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    """Take FSDP where its plugin is given and the processes are connected by a CPU backend."""
    original = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
