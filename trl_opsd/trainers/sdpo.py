# SPDX-License-Identifier: Apache-2.0
"""SDPO: trainer and settings (arXiv 2601.20802)."""

from dataclasses import dataclass, replace

from ..losses import Divergence, Support
from ..methods.sdpo import SDPO
from ..settings.sdpo import SDPOSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class SDPOConfig(SDPOSettings, OPSDConfig):
    """Settings of `SDPOTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `SDPOSettings`."""

    def loss_divergence(self) -> Divergence:
        """The divergence of the loss over its support, with its temperature and clip."""
        return self.restricted(super().loss_divergence())

    def restricted(self, divergence: Divergence) -> Divergence:
        """`divergence` over the student's likeliest tokens and the rest."""
        support = None if self.support_size is None else Support(self.support_size)
        return replace(divergence, support=support)


class SDPOTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads a right peer of each rollout (arXiv 2601.20802).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = SDPO
    config_class = SDPOConfig
