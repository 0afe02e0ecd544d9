# SPDX-License-Identifier: Apache-2.0
"""Step-aligned critique: trainer and settings (arXiv 2606.11173)."""

from dataclasses import dataclass

from ..methods.critique import CRITIQUE
from ..settings.critique import CritiqueSDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class CritiqueSDConfig(CritiqueSDSettings, OPSDConfig):
    """Settings of `CritiqueSDTrainer`: those of `OPSDConfig`, with its own from `CritiqueSDSettings`."""


class CritiqueSDTrainer(SelfDistillationTrainer):
    """Distils from a teacher that reads a critique of the very rollout that it scores (arXiv 2606.11173).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional, and tells a critic what is right. Critiques come from
    `critique_function`, the column `critique`, or the model itself (`write_critique`). See `SelfDistillationTrainer`.
    """

    method = CRITIQUE
    config_class = CritiqueSDConfig
