# SPDX-License-Identifier: Apache-2.0
"""vOPD: trainer and settings (arXiv 2605.07865)."""

from dataclasses import dataclass

from ..methods.vopd import VOPD
from ..settings.vopd import VOPDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class VOPDConfig(VOPDSettings, OPSDConfig):
    """Settings of `VOPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `VOPDSettings`."""


class VOPDTrainer(SelfDistillationTrainer):
    """Policy gradient with the log-ratio of the sampled token, less its mean under the student (arXiv 2605.07865).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. See `SelfDistillationTrainer`.
    """

    method = VOPD
    config_class = VOPDConfig
