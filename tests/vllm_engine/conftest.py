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

REASON = "vllm is not installed here; `make test-vllm` makes an environment that has it"


@pytest.fixture(scope="session")
def engine():
    """Stands where TRL finds vLLM's `LLM`: builds the engine for the first trainer and gives it to all.

    A process holds one engine. Two things are not as TRL leaves them, both because of the CPU: there is no compilation
    (minutes for a tiny model), and linear layers keep their weights. vLLM would pack them into another layout and drop
    the parameter that TRL's sync loads into; here it uses the plain product that it keeps for layers it cannot pack.
    """
    vllm = pytest.importorskip("vllm", reason=REASON)
    from vllm.model_executor.layers import utils as layers

    def keep_weight(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    patch = pytest.MonkeyPatch()
    patch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep_weight)
    yield OneEngine(lambda **arguments: vllm.LLM(**arguments, enforce_eager=True))
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
