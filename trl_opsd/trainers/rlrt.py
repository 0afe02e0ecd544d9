# SPDX-License-Identifier: Apache-2.0
"""RLRT: trainer and settings (arXiv 2605.10781)."""

from dataclasses import dataclass

from ..methods.rlrt import RLRT
from ..settings.rlrt import RLRTSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class RLRTConfig(RLRTSettings, OPSDConfig):
    """Settings of `RLRTTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `RLRTSettings`."""


class RLRTTrainer(SelfDistillationTrainer):
    """GRPO whose advantage is larger where a right rollout surprises the teacher (arXiv 2605.10781).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = RLRT
    config_class = RLRTConfig
