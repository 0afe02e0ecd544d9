# SPDX-License-Identifier: Apache-2.0
"""SDPO: trainer and settings (arXiv 2601.20802)."""

from dataclasses import dataclass

from ..methods.sdpo import SDPO
from ..settings.sdpo import SDPOSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class SDPOConfig(SDPOSettings, OPSDConfig):
    """Settings of `SDPOTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `SDPOSettings`."""


class SDPOTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads a right peer of each rollout (arXiv 2601.20802).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = SDPO
    config_class = SDPOConfig
