# SPDX-License-Identifier: Apache-2.0
"""Rethinking OPD: trainer and settings (arXiv 2604.13016)."""

from dataclasses import dataclass

from ..methods.rethinking_opd import RETHINKING_OPD
from ..settings.rethinking_opd import RethinkingOPDSettings
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


@dataclass
class RethinkingOPDConfig(RethinkingOPDSettings, OPSDConfig):
    """Settings of `RethinkingOPDTrainer`: those of `OPSDConfig`, with the paper's defaults and its own from `RethinkingOPDSettings`."""

    def __post_init__(self):
        super().__post_init__()
        updates = self.steps_per_generation // self.gradient_accumulation_steps * self.num_iterations
        if self.support_size and updates > 1:
            raise ValueError(
                f"support_size={self.support_size} with {updates} updates a generation batch (steps_per_generation="
                f"{self.steps_per_generation}, gradient_accumulation_steps={self.gradient_accumulation_steps}, num_iterations="
                f"{self.num_iterations}): what an older policy gave to a set of tokens is not kept. Set steps_per_generation to "
                "gradient_accumulation_steps and num_iterations to 1, or support_size to 0."
            )


class RethinkingOPDTrainer(SelfDistillationTrainer):
    """Rewards likely tokens by the teacher's log-ratio (arXiv 2604.13016).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. See `SelfDistillationTrainer`.
    """

    method = RETHINKING_OPD
    config_class = RethinkingOPDConfig
