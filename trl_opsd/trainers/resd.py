# SPDX-License-Identifier: Apache-2.0
"""RESD: trainer and settings (arXiv 2605.12741)."""

from dataclasses import dataclass

from ..methods.resd import RESD
from ..settings.resd import RESDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class RESDConfig(RESDSettings, OPSDConfig):
    """Settings of `RESDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `RESDSettings`."""


class RESDTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads each rollout, a review of it and a right one (arXiv 2605.12741).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = RESD
    config_class = RESDConfig
