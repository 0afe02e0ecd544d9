# SPDX-License-Identifier: Apache-2.0
"""AntiSD: trainer and settings (arXiv 2605.11609)."""

from dataclasses import dataclass

from ..methods.antisd import ANTISD
from ..settings.antisd import AntiSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class AntiSDConfig(AntiSDSettings, OPSDConfig):
    """Settings of `AntiSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `AntiSDSettings`."""


class AntiSDTrainer(SelfDistillationTrainer):
    """GRPO whose advantage is lower where a teacher with the answer finds a token likelier (arXiv 2605.11609).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = ANTISD
    config_class = AntiSDConfig
