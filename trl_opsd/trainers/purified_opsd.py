# SPDX-License-Identifier: Apache-2.0
"""Purified OPSD: trainer and settings (arXiv 2607.02234)."""

from dataclasses import dataclass

from ..methods import PURIFIED_OPSD
from ..settings.purified_opsd import PurifiedOPSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class PurifiedOPSDConfig(PurifiedOPSDSettings, OPSDConfig):
    """Settings of `PurifiedOPSDTrainer`: those of `OPSDConfig`, with the paper's defaults and `PurifiedOPSDSettings`."""


class PurifiedOPSDTrainer(SelfDistillationTrainer):
    """OPSD with a reference-only teacher subtracted, so that a model keeps how it thinks (arXiv 2607.02234).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. See `SelfDistillationTrainer`.
    """

    method = PURIFIED_OPSD
    config_class = PurifiedOPSDConfig
