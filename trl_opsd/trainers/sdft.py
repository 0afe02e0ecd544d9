# SPDX-License-Identifier: Apache-2.0
"""SDFT: trainer and settings (arXiv 2601.19897)."""

from dataclasses import dataclass

from ..methods.sdft import SDFT
from ..settings.sdft import SDFTSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class SDFTConfig(SDFTSettings, OPSDConfig):
    """Settings of `SDFTTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `SDFTSettings`."""


class SDFTTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads the row's answer as an example (arXiv 2601.19897).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. The column `solution` holds the example. See
    `SelfDistillationTrainer`.
    """

    method = SDFT
    config_class = SDFTConfig
