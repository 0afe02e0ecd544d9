# SPDX-License-Identifier: Apache-2.0
"""PBSD: trainer and settings (arXiv 2605.05040)."""

from dataclasses import dataclass

from ..methods.pbsd import PBSD
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer
from .settings import option, require


@dataclass
class PBSDSettings:
    """What PBSD alone reads."""

    preference_beta: float = option(0.1, "beta: scales the margin between the two sequences, above 0.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.preference_beta > 0, self, "preference_beta", "a number above 0")


@dataclass
class PBSDConfig(PBSDSettings, OPSDConfig):
    """Settings of `PBSDTrainer`: those of `OPSDConfig`, and those of `PBSDSettings`.

    The paper's beta and learning rate were not found: these are ours.
    """

    def __post_init__(self):
        self.check()
        super().__post_init__()


class PBSDTrainer(SelfDistillationTrainer):
    """Prefers what the model writes when it sees the solution to what it writes without (arXiv 2605.05040).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. Samples two sequences a row. See
    `SelfDistillationTrainer`.
    """

    method = PBSD
    config_class = PBSDConfig
