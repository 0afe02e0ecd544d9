# SPDX-License-Identifier: Apache-2.0
"""Settings of SSOPD (arXiv 2605.17497)."""

from dataclasses import dataclass

from ...settings.fields import option, require
from ...settings.groups import GroupSettings


@dataclass
class SSOPDSettings(GroupSettings):
    """Defaults of the paper that differ from OPSD's, and what SSOPD alone reads.

    The strength is the paper's, and so is the frozen teacher. The length, the clip, the threshold of a right rollout and the sampling are ours.
    """

    reward_weight: float = option(1.0, "Weight of TRL's policy-gradient loss beside the distillation.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens.")
    distillation_length: int | str | None = option(
        1024, "K: only the first so many tokens of the wrong rollout are distilled; None for all."
    )
    frontier_strength: float = option(
        0.5, "lambda_0: weight of the distillation where half of a group is right, 0 or more."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.frontier_strength >= 0, self, "frontier_strength", "0 or more")
