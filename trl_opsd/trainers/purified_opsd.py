# SPDX-License-Identifier: Apache-2.0
"""Purified OPSD: trainer and settings (arXiv 2607.02234)."""

from dataclasses import dataclass

from ..losses import BoundedShape
from ..methods import PURIFIED_OPSD
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer
from .settings import option, require


@dataclass
class PurifiedOPSDConfig(OPSDConfig):
    """Settings of `PurifiedOPSDTrainer`: those of `OPSDConfig` with the paper's defaults, and the ones below.

    The paper prints no weight for the JSD and no loss temperature; 0.5 and the sampling temperature are ours.
    """

    divergence: str = option("jsd", "As in `OPSDConfig`.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`; the paper does not clip.")
    max_steps: int = option(200, "Optimizer steps.")
    tanh_bound: float = option(10.0, "c: no token moves by more than so many nats before the division, above 0.")
    conservativeness: float = option(1.0, "beta: divides the shift; larger stays closer to the base, above 0.")
    decomposition_steps: int = option(10, "As in `OPSDConfig`; the paper's diagnosis, so on by default.")
    real_tokens_only: bool = option(
        True, "Compare the rows of the head that the tokenizer has tokens for, in the mean and in the softmax."
    )

    def __post_init__(self):
        super().__post_init__()
        BoundedShape(self.tanh_bound, self.conservativeness)
        require(
            "{prompt}" not in self.reference_prompt_template,
            self,
            "reference_prompt_template",
            "a text without {prompt}",
        )


class PurifiedOPSDTrainer(SelfDistillationTrainer):
    """OPSD with a reference-only teacher subtracted, so that a model keeps how it thinks (arXiv 2607.02234).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. See `SelfDistillationTrainer`.
    """

    method = PURIFIED_OPSD
    config_class = PurifiedOPSDConfig
