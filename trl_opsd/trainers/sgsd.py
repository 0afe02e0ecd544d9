# SPDX-License-Identifier: Apache-2.0
"""SGSD: trainer and settings (arXiv 2605.28791)."""

from dataclasses import dataclass

from ..methods.sgsd import SGSD
from ..settings.sgsd import SGSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class SGSDConfig(SGSDSettings, OPSDConfig):
    """Settings of `SGSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `SGSDSettings`."""


class SGSDTrainer(SelfDistillationTrainer):
    """Follows or flees several teachers, each shown a skill, by how they judge the rollout (arXiv 2605.28791).

    Takes the arguments of `trl.GRPOTrainer`. Skills come from the file `skill_bank`, or from the column `skills`, a list of texts,
    which may have `skill_scores` beside it. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`. See `SelfDistillationTrainer`.
    """

    method = SGSD
    config_class = SGSDConfig
