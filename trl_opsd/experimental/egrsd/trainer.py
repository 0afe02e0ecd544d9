# SPDX-License-Identifier: Apache-2.0
"""EGRSD and CL-EGRSD: trainer and settings (arXiv 2605.13255)."""

from dataclasses import dataclass

from ...settings.fields import require
from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import EGRSD
from .settings import EGRSDSettings


@dataclass
class EGRSDConfig(EGRSDSettings, OPSDConfig):
    """Settings of `EGRSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `EGRSDSettings`."""

    def __post_init__(self):
        super().__post_init__()
        limited = self.max_completion_length is not None
        require(limited, self, "max_completion_length", "a number: the reward is shaped by it")


class EGRSDTrainer(SelfDistillationTrainer):
    """One rollout a prompt, its reward spread over tokens by what a sure teacher says of them (arXiv 2605.13255).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    See `SelfDistillationTrainer`.
    """

    method = EGRSD
    config_class = EGRSDConfig
