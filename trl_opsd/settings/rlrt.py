# SPDX-License-Identifier: Apache-2.0
"""Settings of RLRT (arXiv 2605.10781)."""

from dataclasses import dataclass

from .fields import option, require, teacher_kind
from .rlsd import RLSDSettings


@dataclass
class RLRTSettings(RLSDSettings):
    """Defaults of the paper that differ from RLSD's, and what RLRT alone reads.

    l was not found: RLSD's first value, held constant, is ours and is not claimed as the paper's. The threshold of a right
    rollout, the learning rate, the temperature and the gradient's norm are ours too.
    """

    max_completion_length: int | None = option(20_480, "Longest rollout in tokens.")
    epsilon_high: float | None = option(0.28, "PPO's clip above; None for `epsilon`.")
    teacher_model_kind: str = teacher_kind("live")
    evidence_bound: float = option(
        0.5,
        "e: the teacher moves a token's weight by at most this, 0 or more. The paper's is 1.0 for base models, 0.5 for "
        "instruct models and 0.2 for those that think.",
    )
    evidence_steps: int | None = option(None, "l falls to 0 over so many optimizer steps; None for no fall.")
    max_rollout_context_length: int | None = option(None, "Budget of the peer that the teacher reads, in tokens.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        length = self.max_rollout_context_length
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")
