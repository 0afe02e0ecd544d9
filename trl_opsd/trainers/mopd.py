# SPDX-License-Identifier: Apache-2.0
"""MOPD: trainer and settings (arXiv 2605.12652)."""

from dataclasses import dataclass

from ..methods.mopd import MOPD
from ..settings.mopd import MOPDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class MOPDConfig(MOPDSettings, OPSDConfig):
    """Settings of `MOPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `MOPDSettings`."""


class MOPDTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads right and wrong peers of each rollout (arXiv 2605.12652).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = MOPD
    config_class = MOPDConfig
