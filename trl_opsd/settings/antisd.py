# SPDX-License-Identifier: Apache-2.0
"""Settings of AntiSD (arXiv 2605.11609)."""

from dataclasses import dataclass

from ..rows.texts import check_template
from .fields import option, require, teacher_kind
from .groups import GroupSettings

VERDICT_PROMPT_TEMPLATE = """{prompt}

A verified solution to this problem stands between the two marks.

=== Verified solution begins ===
{solution}
=== Verified solution ends ===

The answer you are about to give has been checked already: it is {verdict}.

Solve the problem step by step and put the final answer in \\boxed{}."""


@dataclass
class AntiSDSettings(GroupSettings):
    """Defaults of the paper that differ from OPSD's, and what AntiSD alone reads.

    The paper says that the entropy of the first five steps is recorded, not how five become one: we take their mean. Which
    right peer is read, what is right, the temperature and the gradient's norm are ours too: a random one other than the
    rollout itself, 0.5, 1 and 1.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    max_steps: int = option(200, "Optimizer steps.")
    gradient_accumulation_steps: int = option(64, "Micro-batches per optimizer step.")
    max_completion_length: int | None = option(32_768, "Longest rollout in tokens.")
    reward_weight: float = option(1.0, "Factor of GRPO's own advantage.")
    teacher_model_kind: str = teacher_kind("live")
    ascent_strength: float = option(0.5, "lambda: how far the advantage moves away from the teacher; 0 is GRPO.")
    gate_warmup_batches: int = option(
        5, "Generation batches of plain GRPO whose teacher entropy the gate compares with; 0 for no gate."
    )
    gate_closes_below: float = option(0.93, "Share of the first batches' entropy below which the gate closes.")
    gate_opens_at: float = option(1.0, "Share from which it opens again, at least `gate_closes_below`.")
    verdict_prompt_template: str = option(
        VERDICT_PROMPT_TEMPLATE, "The teacher's last user message; holds `{prompt}`, `{solution}` and `{verdict}`."
    )
    max_rollout_context_length: int | None = option(
        None, "Budget of the solution or peer that the teacher reads, in tokens."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.ascent_strength >= 0, self, "ascent_strength", "0 or more")
        require(self.gate_warmup_batches >= 0, self, "gate_warmup_batches", "0 or more")
        require(self.gate_closes_below >= 0, self, "gate_closes_below", "0 or more")
        require(self.gate_opens_at >= self.gate_closes_below, self, "gate_opens_at", "gate_closes_below or more")
        check_template("verdict_prompt_template", self.verdict_prompt_template, "{prompt}", "{solution}", "{verdict}")
        length = self.max_rollout_context_length
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")
