# SPDX-License-Identifier: Apache-2.0
"""OGLS-SD: trainer and settings (arXiv 2605.12400)."""

from dataclasses import dataclass

from ..methods import OGLS_SD
from ..settings.ogls_sd import OGLSSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class OGLSSDConfig(OGLSSDSettings, OPSDConfig):
    """Settings of `OGLSSDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `OGLSSDSettings`."""


class OGLSSDTrainer(SelfDistillationTrainer):
    """Steers the teacher by verified right rollouts against wrong ones (arXiv 2605.12400).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = OGLS_SD
    config_class = OGLSSDConfig
