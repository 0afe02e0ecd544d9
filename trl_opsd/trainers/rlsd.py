# SPDX-License-Identifier: Apache-2.0
"""RLSD: trainer and settings (arXiv 2604.03128)."""

from dataclasses import dataclass

from ..methods.rlsd import RLSD
from ..settings.rlsd import RLSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class RLSDConfig(RLSDSettings, OPSDConfig):
    """Settings of `RLSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `RLSDSettings`."""


class RLSDTrainer(SelfDistillationTrainer):
    """GRPO whose advantage is larger where the teacher confirms a token, and smaller where it does not (arXiv 2604.03128).

    Takes the arguments of `trl.GRPOTrainer`. Rewards: `reward_funcs`, or math-verify on `solution`. See `SelfDistillationTrainer`.
    """

    method = RLSD
    config_class = RLSDConfig
