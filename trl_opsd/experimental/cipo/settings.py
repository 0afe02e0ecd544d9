# SPDX-License-Identifier: Apache-2.0
"""Settings of correction prompts (CIPO, arXiv 2605.14539); they stand beside those of the trainer that they are given to."""

import math
from dataclasses import dataclass

from ...rows.texts import check_template
from ...settings.fields import option, require

CORRECTION_TEMPLATE = """{prompt}

An earlier attempt at this problem stands between the two marks. It may be wrong anywhere, and it may be right.

=== Attempt begins ===
{attempt}
=== Attempt ends ===

Check it step by step, then answer the problem."""


@dataclass(frozen=True)
class CorrectionSettings:
    """How many prompts show an earlier attempt, and which attempts; all values are ours, after summaries of the paper."""

    correction_share: float = option(
        0.5, "Share of a generation batch's groups that answer a correction prompt, in [0, 1]; 0 changes nothing."
    )
    right_attempt_share: float = option(0.25, "Share of the correction prompts that show a right attempt, in [0, 1].")
    max_attempt_age: int = option(
        1, "Generation batches within which an attempt is shown, 1 or more; 1 is the next one alone."
    )
    broken_penalty: float = option(
        1.0,
        "What the reward loses where a right attempt was shown and the answer is wrong, 0 or more; above 0 it needs a single "
        "reward function.",
    )
    reward_threshold: float = option(0.5, "A rollout is right where its reward is at least this.")
    strip_thinking: bool = option(True, "Remove think blocks from the attempts that are shown.")
    max_correction_prompt_length: int | None = option(
        None,
        "Longest correction prompt in tokens; an attempt that makes a longer one is skipped and counted. None for what the model's "
        "positions leave beside a completion.",
    )
    correction_template: str = option(
        CORRECTION_TEMPLATE, "The last user message of a correction prompt; holds `{prompt}` and `{attempt}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        for name in ("correction_share", "right_attempt_share"):
            require(0 <= getattr(self, name) <= 1, self, name, "a number in [0, 1]")
        for name in ("max_attempt_age", "max_correction_prompt_length"):
            value, is_length = getattr(self, name), name == "max_correction_prompt_length"
            is_whole = type(value) is int and value >= 1
            wanted = "a whole number, 1 or more" + ", or None" * is_length
            require(is_whole or (is_length and value is None), self, name, wanted)
        require(0 <= self.broken_penalty < math.inf, self, "broken_penalty", "a number, 0 or more")
        require(math.isfinite(self.reward_threshold), self, "reward_threshold", "a number")
        check_template("correction_template", self.correction_template, "{prompt}", "{attempt}")
