# SPDX-License-Identifier: Apache-2.0
"""Settings of the saliency reward (AtManRL, arXiv 2604.16158)."""

import math
from dataclasses import dataclass

from ...settings.fields import option, require


@dataclass(frozen=True)
class SaliencySettings:
    """How a rollout is cut and how its mask is searched for.

    The number of steps is about the paper's, as a note on it tells; all other values are ours.
    """

    answer_marker: str = option(
        "\\boxed{",
        "Text behind which the answer begins, such as `\\boxed{`, `####` or `</think>`. Its last place in a rollout counts, and what "
        "stands before it is the reasoning.",
    )
    max_answer_tokens: int = option(32, "Tokens of the answer that are read, 1 or more.")
    verifier: str = option("math", "Who says that an answer is right: `math`, `exact`, `choice` or `module:function`.")
    mask_steps: int = option(200, "Steps of gradient descent for each mask, 1 or more.")
    mask_start: float = option(-5.0, "What is added to every score at first, below 0.")
    mask_rate: float = option(1.0, "Step size of the descent, above 0.")
    sparsity: float = option(0.1, "c: the price of reading the whole reasoning in nats, 0 or more.")
    rows_at_once: int = option(8, "Rollouts whose masks are searched for in one forward, 1 or more.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        marker = self.answer_marker
        require(isinstance(marker, str) and marker.strip(), self, "answer_marker", "a text that opens the answer")
        for name in ("max_answer_tokens", "mask_steps", "rows_at_once"):
            require(
                type(getattr(self, name)) is int and getattr(self, name) >= 1, self, name, "a whole number, 1 or more"
            )
        require(-math.inf < self.mask_start < 0, self, "mask_start", "a number below 0")
        require(0 < self.mask_rate < math.inf, self, "mask_rate", "a number above 0")
        require(0 <= self.sparsity < math.inf, self, "sparsity", "0 or more")
