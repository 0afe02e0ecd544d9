# SPDX-License-Identifier: Apache-2.0
"""PBSD: trainer and settings (arXiv 2605.05040)."""

from dataclasses import dataclass

from ..methods.pbsd import PBSD
from ..settings.pbsd import PBSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class PBSDConfig(PBSDSettings, OPSDConfig):
    """Settings of `PBSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `PBSDSettings`."""


class PBSDTrainer(SelfDistillationTrainer):
    """Prefers what the model writes when it sees the solution to what it writes without (arXiv 2605.05040).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. Samples two sequences a row. See
    `SelfDistillationTrainer`.
    """

    method = PBSD
    config_class = PBSDConfig
