# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine on CPU, built by TRL's own call; `make test-vllm` runs these tests in their own environment.

Not called `tests/vllm`: `tests` is on the import path, where a folder of that name would pass for the package.
"""

import os

os.environ["HF_HUB_OFFLINE"], os.environ["VLLM_NO_USAGE_STATS"] = "1", "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # training shares the process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch


@pytest.fixture(scope="session")
def engine():
    """Stands where TRL finds vLLM's `LLM`: builds the engine for the first trainer and gives it to all.

    A process holds one engine. Three things are not as TRL leaves them. Linear layers keep their weights: vLLM on CPU
    would pack them into another layout and drop the parameter that TRL's sync loads into; here it takes the plain
    product that it has for layers it cannot pack. There is no compilation, which takes minutes for a tiny model. And
    the numbers are float32, the student's: vLLM makes bfloat16 of it by itself, 0.03 nats off.
    """
    import vllm
    from vllm.model_executor.layers import utils as layers

    def keep_weight(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    patch = pytest.MonkeyPatch()
    patch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep_weight)
    yield OneEngine(lambda **arguments: vllm.LLM(**arguments, enforce_eager=True, dtype="float32"))
    patch.undo()


class OneEngine:
    """Makes the engine once; later trainers must ask for the same one."""

    def __init__(self, make):
        self.make, self.llm, self.arguments = make, None, None

    def __call__(self, **arguments):
        if self.llm is None:
            self.llm, self.arguments = self.make(**arguments), arguments
        assert arguments == self.arguments, "a test asks for another engine than the first one made"
        return self.llm
