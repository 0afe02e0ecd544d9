# SPDX-License-Identifier: Apache-2.0
"""Settings of SORT (arXiv 2605.11505)."""

from dataclasses import dataclass

from ...rows.texts import check_template
from ...settings.fields import option, require
from ...settings.groups import GroupSettings

PLAN_PROMPT_TEMPLATE = """{prompt}

A plan for this problem:

{plan}"""


@dataclass
class SORTSettings(GroupSettings):
    """Defaults of the paper that differ from OPSD's, and what SORT alone reads.

    None of the paper's settings were found: all are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    reward_weight: float = option(1.0, "Weight of TRL's policy-gradient loss beside the repair.")
    teacher_model_kind: str = option("live", "Whose weights read the solution with the plan: `live`, `base` or `ema`.")
    repair_weight: float = option(0.1, "eta: weight of the reference solution beside GRPO, 0 or more.")
    plan_share: float = option(0.5, "a: share of the probability that the plan gives in a token's weight, in [0, 1].")
    plan_prompt_template: str = option(
        PLAN_PROMPT_TEMPLATE, "The user message that shows the plan; holds `{prompt}` and `{plan}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.repair_weight >= 0, self, "repair_weight", "0 or more")
        require(0 <= self.plan_share <= 1, self, "plan_share", "a number in [0, 1]")
        check_template("plan_prompt_template", self.plan_prompt_template, "{prompt}", "{plan}")
