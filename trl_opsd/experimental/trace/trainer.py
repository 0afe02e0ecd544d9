# SPDX-License-Identifier: Apache-2.0
"""TRACE: trainer and settings (arXiv 2605.10194)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import TRACE
from .settings import TRACESettings


@dataclass
class TRACEConfig(TRACESettings, OPSDConfig):
    """Settings of `TRACETrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `TRACESettings`."""


class TRACETrainer(SelfDistillationTrainer):
    """GRPO with a divergence on decisive spans of rollouts for the first steps (arXiv 2605.10194).

    Takes the arguments of `trl.GRPOTrainer`. Spans come from `annotator_function`, or from the column `spans`. Rewards decide what
    is right: `reward_funcs`, or math-verify on `solution`. See `SelfDistillationTrainer`.
    """

    method = TRACE
    config_class = TRACEConfig
