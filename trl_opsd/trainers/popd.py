# SPDX-License-Identifier: Apache-2.0
"""POPD and TOPD: trainer and settings (arXiv 2605.31490)."""

from dataclasses import dataclass

from ..methods.popd import POPD
from ..settings.popd import POPDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class POPDConfig(POPDSettings, OPSDConfig):
    """Settings of `POPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `POPDSettings`."""


class POPDTrainer(SelfDistillationTrainer):
    """Policy gradient with the log-ratio of the sampled token on the first part of a rollout (arXiv 2605.31490).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. See `SelfDistillationTrainer`.
    """

    method = POPD
    config_class = POPDConfig
