# SPDX-License-Identifier: Apache-2.0
"""Settings of StableOPD (arXiv 2604.08527)."""

from dataclasses import dataclass

from ...settings.fields import option, require
from ...settings.sampled import SampledTokenSettings


@dataclass
class StableOPDSettings(SampledTokenSettings):
    """Defaults of the paper that differ from OPSD's, and what StableOPD alone reads.

    The paper's batch of 64 prompts with 4 rollouts each and its learning rate are known to us. l_g and b are from a
    re-implementation; the lengths and the gradient's norm are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    gradient_accumulation_steps: int = option(64, "Micro-batches per optimizer step.")
    num_generations: int | None = option(4, "Rollouts per prompt, which one reference solution joins; 1 or more.")
    max_completion_length: int | None = option(8192, "Longest rollout, and longest solution, in tokens.")
    max_grad_norm: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    golden_weight: float = option(0.1, "l_g: weight of the solution's negative log-likelihood, 0 or more.")
    reference_weight: float = option(
        0.01, "b: weight of the divergence from the initial student on the rollouts, 0 or more."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.golden_weight >= 0, self, "golden_weight", "0 or more")
        require(self.reference_weight >= 0, self, "reference_weight", "0 or more")
