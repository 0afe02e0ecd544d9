# SPDX-License-Identifier: Apache-2.0
"""SORT: trainer and settings (arXiv 2605.11505)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import SORT
from .settings import SORTSettings


@dataclass
class SORTConfig(SORTSettings, OPSDConfig):
    """Settings of `SORTTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `SORTSettings`."""


class SORTTrainer(SelfDistillationTrainer):
    """GRPO that learns the reference solution where every rollout of a prompt is wrong (arXiv 2605.11505).

    Takes the arguments of `trl.GRPOTrainer`. Rows have the column `plan`, a text; one without a plan or a solution is left to
    GRPO. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`. See `SelfDistillationTrainer`.
    """

    method = SORT
    config_class = SORTConfig
