# SPDX-License-Identifier: Apache-2.0
"""RCSD: trainer and settings (arXiv 2606.19327)."""

from dataclasses import dataclass

from ..methods.rcsd import RCSD
from ..settings.rcsd import RCSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class RCSDConfig(RCSDSettings, OPSDConfig):
    """Settings of `RCSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `RCSDSettings`."""


class RCSDTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads a rubric and its own analysis of it (arXiv 2606.19327).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. Rows may have the column `rubric`, a list of texts.
    Samples an analysis for each rollout. See `SelfDistillationTrainer`.
    """

    method = RCSD
    config_class = RCSDConfig
