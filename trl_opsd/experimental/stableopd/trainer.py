# SPDX-License-Identifier: Apache-2.0
"""StableOPD: trainer and settings (arXiv 2604.08527)."""

from dataclasses import dataclass

from ...trainers.config import OPSDConfig
from ...trainers.self_distillation import SelfDistillationTrainer
from .method import STABLE_OPD
from .settings import StableOPDSettings


@dataclass
class StableOPDConfig(StableOPDSettings, OPSDConfig):
    """Settings of `StableOPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `StableOPDSettings`."""


class StableOPDTrainer(SelfDistillationTrainer):
    """Distils the sampled token, held by the reference solution and by the initial student (arXiv 2604.08527).

    Takes the arguments of `trl.GRPOTrainer`. `solution` is read by the teacher and learnt as a completion, so it should have the
    form of one. See `SelfDistillationTrainer`.
    """

    method = STABLE_OPD
    config_class = StableOPDConfig
