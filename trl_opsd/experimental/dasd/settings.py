# SPDX-License-Identifier: Apache-2.0
"""Settings of DASD (arXiv 2605.22263)."""

from dataclasses import dataclass

from ...settings.fields import option, require, teacher_kind
from ...settings.groups import GroupSettings


@dataclass
class DASDSettings(GroupSettings):
    """What DASD alone reads, and defaults that differ from OPSD's.

    rho is the paper's, as two notes on it tell. beta, whose weights the teacher has, the learning rate, the batch and the
    lengths are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    gradient_accumulation_steps: int = option(64, "Micro-batches per optimizer step.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens.")
    clip: str | None = option(None, "Without effect: there is no divergence to clip.")
    reward_weight: float = option(1.0, "Factor of GRPO's own advantage.")
    teacher_model_kind: str = teacher_kind("live")
    direction_strength: float = option(0.1, "beta: how far a typical token's advantage is moved, 0 or more; 0 is GRPO.")
    pulled_share: float = option(
        0.2, "rho, in [0, 1]: so large a share of a rollout's tokens, its surest ones, is pulled to the teacher."
    )
    max_rollout_context_length: int | None = option(
        None, "Budget of the solution or peer that the teacher reads, in tokens."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.direction_strength >= 0, self, "direction_strength", "0 or more")
        require(0 <= self.pulled_share <= 1, self, "pulled_share", "a number in [0, 1]")
        length = self.max_rollout_context_length
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")
