# SPDX-License-Identifier: Apache-2.0
"""MSD: trainer and settings (arXiv 2605.02971)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import MSD
from .settings import MSDSettings


@dataclass
class MSDConfig(MSDSettings, OPSDConfig):
    """Settings of `MSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `MSDSettings`."""


class MSDTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads the request in English too, most where safety is decided (arXiv 2605.02971).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. Rows have the column `translation`, a text, and need no
    solution. See `SelfDistillationTrainer`.
    """

    method = MSD
    config_class = MSDConfig
