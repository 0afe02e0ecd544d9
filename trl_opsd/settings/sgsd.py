# SPDX-License-Identifier: Apache-2.0
"""Settings of SGSD (arXiv 2605.28791)."""

from dataclasses import dataclass

from ..rows.texts import check_template
from .fields import option, require

SKILL_PROMPT_TEMPLATE = """Advice from earlier problems that may or may not fit this one:

{skill}

The problem:

{prompt}"""


@dataclass
class SGSDSettings:
    """Defaults of the paper that differ from OPSD's, and what SGSD alone reads."""

    teacher_model_kind: str = option("live", "Whose weights the teacher has: `live`, `base` or `ema`.")
    loss_temperature: float | None = option(1.0, "Divides both models' logits in the loss.")
    max_steps: int = option(200, "Optimizer steps.")
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")
    max_skills: int = option(
        8, "Most skills of a row that are read, the best scored ones, or the first without scores."
    )
    support_clip: float = option(3.0, "Bound of a token's log-ratio where a teacher is judged, in nats, above 0.")
    support_threshold: float = option(0.05, "A teacher whose mean log-ratio is at most this has no opinion, 0 or more.")
    skill_prompt_template: str = option(
        SKILL_PROMPT_TEMPLATE, "The teacher's last user message; holds `{skill}` and `{prompt}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.max_skills >= 1, self, "max_skills", "1 or more")
        require(self.support_clip > 0, self, "support_clip", "a number above 0")
        require(self.support_threshold >= 0, self, "support_threshold", "0 or more")
        check_template("skill_prompt_template", self.skill_prompt_template, "{skill}", "{prompt}")
