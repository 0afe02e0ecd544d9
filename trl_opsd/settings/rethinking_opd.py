# SPDX-License-Identifier: Apache-2.0
"""Settings of Rethinking OPD (arXiv 2604.13016)."""

from dataclasses import dataclass
from typing import Any

from .fields import option, require
from .sampled import SampledTokenSettings


@dataclass
class RethinkingOPDSettings(SampledTokenSettings):
    """Defaults of the paper that differ from OPSD's, and what Rethinking OPD alone reads.

    The sampling temperature, PPO's clip, the batch and the gradient's norm are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    num_generations: int | None = option(4, "Rollouts per prompt.")
    max_completion_length: int | None = option(7168, "Longest rollout in tokens.")
    divergence: str = option("policy_reverse_kl", "What the rewards of tokens descend; no other is possible.")
    delta: float | None = option(
        3.0, "Ratios above this have no gradient for a punished token either (dual clip); None for no bound."
    )
    support_size: int = option(16, "k: so many tokens of a position are rewarded; 0 for the sampled one alone.")
    support_of: str = option(
        "student", "Whose likeliest tokens they are: `student`, `target` (the teacher), `union` or `intersection`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        from ..losses import SUPPORTS

        require(self.support_size >= 0, self, "support_size", "0 or more")
        require(self.support_of in SUPPORTS, self, "support_of", f"one of {SUPPORTS}")
        if self.support_size == 0 and self.support_of != "student":
            raise ValueError(
                f"support_of={self.support_of!r} with support_size=0: the sampled token is of no set. Set support_size to 1 or "
                "more, or leave support_of."
            )

    def divergence_limits(self) -> dict[str, Any]:
        """The rewarded tokens, with their probabilities of the whole vocabulary."""
        from ..losses import Support

        size = self.support_size
        return {"support": Support(max(1, size), self.support_of if size else "sampled", "whole")}
