# SPDX-License-Identifier: Apache-2.0
"""DASD: trainer and settings (arXiv 2605.22263)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import DASD
from .settings import DASDSettings


@dataclass
class DASDConfig(DASDSettings, OPSDConfig):
    """Settings of `DASDTrainer`: those of `OPSDConfig`, with other defaults and its own from `DASDSettings`."""


class DASDTrainer(SelfDistillationTrainer):
    """GRPO that pulls sure tokens to a teacher with a solution and pushes unsure ones away (arXiv 2605.22263).

    Experimental: parts of the formula are inferred. Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right:
    `reward_funcs`, or math-verify on `solution`. Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = DASD
    config_class = DASDConfig
