# SPDX-License-Identifier: Apache-2.0
"""BRTS: trainer and settings (arXiv 2605.09725)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import BRTS
from .settings import BRTSSettings


@dataclass
class BRTSConfig(BRTSSettings, OPSDConfig):
    """Settings of `BRTSTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `BRTSSettings`."""


class BRTSTrainer(SelfDistillationTrainer):
    """Distils on rollouts, and on the best of several answers that the teacher writes itself (arXiv 2605.09725).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide which answers are right: `reward_funcs`, or math-verify on `solution`;
    they are asked about the teacher's answers as about rollouts. See `SelfDistillationTrainer`.
    """

    method = BRTS
    config_class = BRTSConfig
