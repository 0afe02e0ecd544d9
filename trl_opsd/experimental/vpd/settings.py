# SPDX-License-Identifier: Apache-2.0
"""Settings of VPD (arXiv 2605.15113)."""

from dataclasses import dataclass
from typing import Any

from ...rows.texts import check_template
from ...settings.fields import option, pin, require, teacher_kind
from ...settings.sdpo import SDPOSettings

WRONG_BLOCK = """

A solution that was found wrong stands between the two marks.

=== Wrong solution begins ===
{text}
=== Wrong solution ends ==="""


@dataclass
class VPDSettings(SDPOSettings):
    """SDPO's settings, those that the notes on the paper name as there, and what VPD alone reads.

    Beta 0.1, an E-step after five M-steps, reverse KL and one set of weights are the paper's. The weight of an E-step, the momentum of
    the midpoint, the learning rate, the 20 likeliest tokens and all texts are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW, of both kinds of steps.")
    teacher_model_kind: str = teacher_kind("live")
    divergence: str = option("reverse_kl", "What M-steps measure between teacher and student.")
    support_size: int | None = option(
        20, "The divergence is over so many of the student's likeliest tokens and one entry for the rest; None for all."
    )
    maximization_steps: int | None = option(
        5, "F: M-steps between two E-steps, 1 or more; none for no E-steps, which is SDPO with a live teacher."
    )
    reward_beta: float = option(0.1, "beta: scales the log-ratio of teacher and student of a whole rollout, above 0.")
    expectation_weight: float = option(0.1, "Factor of the loss of an E-step, above 0.")
    midpoint_momentum: float = option(
        0.9, "Share, in [0, 1), of what delta was that stays in it when an E-step has right and wrong rollouts."
    )
    show_wrong_sibling: bool = option(True, "Show the teacher a wrong sibling beside a right one.")
    wrong_block: str = option(WRONG_BLOCK, "What stands around a wrong sibling, `{text}`.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        steps = self.maximization_steps
        require(steps is None or steps >= 1, self, "maximization_steps", "1 or more, or None")
        require(self.reward_beta > 0, self, "reward_beta", "a number above 0")
        require(self.expectation_weight > 0, self, "expectation_weight", "a number above 0")
        require(0 <= self.midpoint_momentum < 1, self, "midpoint_momentum", "a share in [0, 1)")
        check_template("wrong_block", self.wrong_block, "{text}")
        pin(
            self,
            "teacher_model_kind",
            "live",
            "student and teacher are one set of weights, of which E-steps train one side",
        )
        pin(self, "live_share", None, "the teacher is live")
        if steps is not None:
            self._check_whole_rollouts()

    def _check_whole_rollouts(self) -> None:
        reason = "an E-step compares whole rollouts"
        pin(self, "distillation_length", None, reason)
        pin(self, "num_loss_tokens_to_skip", 0, reason)
        generation: Any = getattr(self, "steps_per_generation", None)
        accumulation: Any = getattr(self, "gradient_accumulation_steps", None)
        if generation != accumulation or getattr(self, "num_iterations", 1) != 1:
            raise ValueError(
                f"steps_per_generation={generation} and num_iterations={getattr(self, 'num_iterations', 1)}: an E-step is a "
                f"generation batch of its own. Set them to gradient_accumulation_steps={accumulation} and 1, or "
                "maximization_steps=None."
            )
