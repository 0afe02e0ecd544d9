# SPDX-License-Identifier: Apache-2.0
"""Settings of RLSD (arXiv 2604.03128, code iie-ycx/RLSD)."""

from dataclasses import dataclass

from .fields import option, require
from .groups import GroupSettings


@dataclass
class RLSDSettings(GroupSettings):
    """Defaults of the official code that differ from OPSD's, and what RLSD alone reads.

    That l falls linearly, the batch, the lengths and the learning rate are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    gradient_accumulation_steps: int = option(64, "Micro-batches per optimizer step.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens.")
    clip: str | None = option(None, "Without effect: there is no divergence to clip.")
    reward_weight: float = option(1.0, "Factor of GRPO's own advantage.")
    evidence_strength: float = option(0.5, "l: share of the advantage that the teacher weighs, in [0, 1]; 0 is GRPO.")
    evidence_bound: float = option(
        0.2, "e: the teacher moves a token's weight by at most this, 0 or more; above 1 signs may turn."
    )
    evidence_steps: int | None = option(
        60, "l falls to 0 over so many optimizer steps, and the teacher is not asked from then on; None for no fall."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.reward_weight > 0, self, "reward_weight", "a number above 0: the teacher only weighs the reward")
        require(0 <= self.evidence_strength <= 1, self, "evidence_strength", "a number in [0, 1]")
        require(self.evidence_bound >= 0, self, "evidence_bound", "0 or more")
        steps = self.evidence_steps
        require(steps is None or steps >= 1, self, "evidence_steps", "1 or more, or None")
