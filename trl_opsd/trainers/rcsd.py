# SPDX-License-Identifier: Apache-2.0
"""RCSD: trainer and settings (arXiv 2606.19327)."""

from dataclasses import dataclass, replace

from ..losses import Divergence, Support
from ..methods.rcsd import ANALYSIS_PROMPT_TEMPLATE, GUIDED_PROMPT_TEMPLATE, RCSD
from ..rows.texts import check_template
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer
from .settings import option, require


@dataclass
class RCSDSettings:
    """What RCSD alone reads."""

    support_size: int | None = option(
        20, "Tokens that are compared, the teacher's likeliest, both sides renormalised; None for all."
    )
    write_analysis: bool = option(True, "The model writes what the guidance requires before the teacher scores.")
    analysis_prompt_template: str = option(
        ANALYSIS_PROMPT_TEMPLATE, "What the model answers first; holds `{prompt}`, `{solution}` and `{guidance}`."
    )
    guided_prompt_template: str = option(
        GUIDED_PROMPT_TEMPLATE, "The teacher's last user message; holds `{prompt}`, `{solution}` and `{guidance}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.support_size is None or self.support_size >= 1, self, "support_size", "1 or more, or None")
        for name in ("analysis_prompt_template", "guided_prompt_template"):
            check_template(name, getattr(self, name), "{prompt}", "{solution}", "{guidance}")

    def restricted(self, divergence: Divergence) -> Divergence:
        """`divergence` over the teacher's likeliest tokens."""
        if self.support_size is None:
            return divergence
        return replace(divergence, support=Support(self.support_size, of="target", remainder="renormalise"))


@dataclass
class RCSDConfig(RCSDSettings, OPSDConfig):
    """Settings of `RCSDTrainer`: those of `OPSDConfig` with the paper's defaults, and those of `RCSDSettings`."""

    chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": True}, "Keyword arguments of the chat template for the student's prompt."
    )
    max_completion_length: int | None = option(4096, "Longest rollout, and longest analysis, in tokens.")
    temperature: float = option(1.2, "Sampling temperature of the rollouts, and of the loss.")

    def __post_init__(self):
        self.check()
        super().__post_init__()

    def loss_divergence(self) -> Divergence:
        """The divergence of the loss over its support, with its temperature and clip."""
        return self.restricted(super().loss_divergence())


class RCSDTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads a rubric and its own analysis of it (arXiv 2606.19327).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. Rows may have the column `rubric`, a list of texts.
    Samples an analysis for each rollout. See `SelfDistillationTrainer`.
    """

    method = RCSD
    config_class = RCSDConfig
