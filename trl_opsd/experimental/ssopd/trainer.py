# SPDX-License-Identifier: Apache-2.0
"""SSOPD: trainer and settings (arXiv 2605.17497)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import SSOPD
from .settings import SSOPDSettings


@dataclass
class SSOPDConfig(SSOPDSettings, OPSDConfig):
    """Settings of `SSOPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `SSOPDSettings`."""


class SSOPDTrainer(SelfDistillationTrainer):
    """GRPO in which the shortest right rollout of a group teaches its longest wrong one (arXiv 2605.17497).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`. See
    `SelfDistillationTrainer`.
    """

    method = SSOPD
    config_class = SSOPDConfig
