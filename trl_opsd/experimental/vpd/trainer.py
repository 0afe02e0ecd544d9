# SPDX-License-Identifier: Apache-2.0
"""VPD: trainer and settings (arXiv 2605.15113)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import VPD
from .settings import VPDSettings


@dataclass
class VPDConfig(VPDSettings, OPSDConfig):
    """Settings of `VPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `VPDSettings`."""


class VPDTrainer(SelfDistillationTrainer):
    """Takes turns: the student learns from a live teacher, and the teacher's prompt learns to tell right from wrong (arXiv 2605.15113).

    Takes the arguments of `trl.GRPOTrainer`; without `reward_funcs`, answers are verified. Rollouts of tools are refused. See
    `SelfDistillationTrainer`.
    """

    method = VPD
    config_class = VPDConfig
