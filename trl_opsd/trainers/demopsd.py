# SPDX-License-Identifier: Apache-2.0
"""DemoPSD: trainer and settings (arXiv 2607.02502)."""

from dataclasses import dataclass

from ..methods.demopsd import DEMOPSD
from ..settings.demopsd import DemoPSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class DemoPSDConfig(DemoPSDSettings, OPSDConfig):
    """Settings of `DemoPSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `DemoPSDSettings`."""


class DemoPSDTrainer(SelfDistillationTrainer):
    """Distils from a mix of a teacher that reads a right peer and of the plain view (arXiv 2607.02502).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = DEMOPSD
    config_class = DemoPSDConfig
