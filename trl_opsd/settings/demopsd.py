# SPDX-License-Identifier: Apache-2.0
"""Settings of DemoPSD (arXiv 2607.02502)."""

from dataclasses import dataclass
from typing import Any

from .fields import option, require, teacher_kind
from .groups import GroupSettings


@dataclass
class DemoPSDSettings(GroupSettings):
    """Defaults of the paper that differ from OPSD's, and what DemoPSD alone reads.

    The paper gives neither the threshold of a right rollout nor the temperature and the gradient's norm: 0.5, 1 and 1 are
    ours. It is silent on whether a rollout may be its own peer: here it may not. A peer that is too long loses
    its middle, where the paper cuts its end.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    max_steps: int = option(-1, "Optimizer steps; -1 for `num_train_epochs`.")
    num_train_epochs: float = option(3.0, "Passes over the prompts.")
    max_completion_length: int | None = option(16_384, "Longest rollout in tokens.")
    teacher_model_kind: str = teacher_kind("ema")
    teacher_update_rate: float = option(0.05, "Share of the student in each update of the `ema` teacher, in (0, 1].")
    divergence: str = option("reverse_kl", "What is measured between teacher and student.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`.")
    largest_plain_share: float = option(0.15, "a_max: largest share of the plain view in the target, in [0, 1].")
    disagreement_sensitivity: float = option(
        50.0, "beta, above 0; the paper's is 70 in biology, 25 in chemistry, 50 in materials and 100 in physics."
    )
    support_size: int | None = option(
        100,
        "The divergence is over so many of the student's likeliest tokens and one entry for the rest; None for all.",
    )
    target_floor: float | None = option(1e-8, "Lowest probability of a compared entry of the target; None for none.")
    importance_cap: float = option(2.0, "Largest ratio of the student to the policy that sampled, above 0.")
    max_rollout_context_length: int | None = option(10_240, "Budget of the peer that the teacher reads, in tokens.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(0 <= self.largest_plain_share <= 1, self, "largest_plain_share", "a number in [0, 1]")
        require(self.disagreement_sensitivity > 0, self, "disagreement_sensitivity", "a number above 0")
        require(self.support_size is None or self.support_size >= 1, self, "support_size", "1 or more, or None")
        require(self.importance_cap > 0, self, "importance_cap", "a number above 0")
        length = self.max_rollout_context_length
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")

    def divergence_limits(self) -> dict[str, Any]:
        """The student's likeliest tokens and the rest, under the floor."""
        from ..losses import Support

        support = None if self.support_size is None else Support(self.support_size)
        return {"support": support, "target_floor": self.target_floor}
