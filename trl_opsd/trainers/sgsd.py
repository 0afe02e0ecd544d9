# SPDX-License-Identifier: Apache-2.0
"""SGSD: trainer and settings (arXiv 2605.28791)."""

from dataclasses import dataclass

from ..methods.sgsd import SGSD, SKILL_PROMPT_TEMPLATE
from ..rows.texts import check_template
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer
from .settings import option, require


@dataclass
class SGSDSettings:
    """What SGSD alone reads."""

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


@dataclass
class SGSDConfig(SGSDSettings, OPSDConfig):
    """Settings of `SGSDTrainer`: those of `OPSDConfig` with the paper's defaults, and those of `SGSDSettings`."""

    teacher_model_kind: str = option("live", "Whose weights the teacher has: `live`, `base` or `ema`.")
    loss_temperature: float | None = option(1.0, "Divides both models' logits in the loss.")
    max_steps: int = option(200, "Optimizer steps.")

    def __post_init__(self):
        self.check()
        super().__post_init__()


class SGSDTrainer(SelfDistillationTrainer):
    """Follows or flees several teachers, each shown a skill, by how they judge the rollout (arXiv 2605.28791).

    Takes the arguments of `trl.GRPOTrainer`. Rows have the column `skills`, a list of texts, and may have `skill_scores`.
    Rewards decide what is right: `reward_funcs`, or math-verify on `solution`. See `SelfDistillationTrainer`.
    """

    method = SGSD
    config_class = SGSDConfig
