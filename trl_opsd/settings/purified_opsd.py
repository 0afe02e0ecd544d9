# SPDX-License-Identifier: Apache-2.0
"""Settings of Purified OPSD (arXiv 2607.02234)."""

from dataclasses import dataclass

from ..rows.texts import check_template
from ..teacher.contexts import REFERENCE_PROMPT_TEMPLATE
from .fields import option, require


@dataclass
class PurifiedOPSDSettings:
    """Defaults of the paper that differ from OPSD's, and what Purified OPSD alone reads.

    The paper prints no weight for the JSD and no loss temperature; 0.5 and the sampling temperature are ours.
    """

    divergence: str = option("jsd", "As in `OPSDConfig`.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`; the paper does not clip.")
    max_steps: int = option(200, "Optimizer steps.")
    tanh_bound: float = option(10.0, "c: no token moves by more than so many nats before the division, above 0.")
    conservativeness: float = option(1.0, "beta: divides the shift; larger stays closer to the base, above 0.")
    reference_prompt_template: str = option(
        REFERENCE_PROMPT_TEMPLATE, "The user message of the teacher that sees the solution but not the problem."
    )
    decomposition_steps: int = option(
        10,
        "Optimizer steps between two measurements of how much of the teacher's signal the solution alone explains; 0 "
        "for none. Each scores three views of a few rollouts.",
    )
    real_tokens_only: bool = option(
        True, "Compare the rows of the head that the tokenizer has tokens for, in the mean and in the softmax."
    )

    def check(self) -> None:
        """Raise a ValueError for a setting of the method outside its range."""
        from ..losses import BoundedShape

        BoundedShape(self.tanh_bound, self.conservativeness)
        require(self.decomposition_steps >= 0, self, "decomposition_steps", "0 or more")
        check_template("reference_prompt_template", self.reference_prompt_template, "{solution}")
        no_prompt = "{prompt}" not in self.reference_prompt_template
        require(no_prompt, self, "reference_prompt_template", "a text without {prompt}")
