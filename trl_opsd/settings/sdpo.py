# SPDX-License-Identifier: Apache-2.0
"""Settings of SDPO (arXiv 2601.20802)."""

from dataclasses import dataclass
from typing import Any

from ..rows.texts import check_template
from .fields import option, require
from .groups import GroupSettings

PEER_PROMPT_TEMPLATE = """{prompt}

A solution that was found right stands between the two marks.

=== Solution begins ===
{solution}
=== Solution ends ===

Solve the problem."""


@dataclass
class SDPOSettings(GroupSettings):
    """Defaults of the paper that differ from OPSD's, and what SDPO alone reads.

    The gradient's norm and unrestricted sampling are ours.
    """

    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens.")
    teacher_model_kind: str = option(
        "ema", "Whose weights the teacher has: `base` the initial ones, `live` the student's, `ema` a moving average."
    )
    teacher_update_rate: float = option(0.05, "Share of the student in each update of the `ema` teacher, in (0, 1].")
    divergence: str = option("jsd", "What is measured between teacher and student.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`.")
    live_share: float | None = option(
        None,
        "r of the trust region, in [0, 1]: the teacher's logits are (1 - r) of the initial weights' and r of the student's; "
        "needs `teacher_model_kind` `base` and a head that does not train. None for no mix.",
    )
    support_size: int | None = option(
        100,
        "The divergence is over so many of the student's likeliest tokens and one entry for the rest; None for all.",
    )
    importance_cap: float = option(2.0, "Largest ratio of the student to the policy that sampled, above 0.")
    max_rollout_context_length: int | None = option(None, "Budget of the peer that the teacher reads, in tokens.")
    peer_prompt_template: str = option(
        PEER_PROMPT_TEMPLATE, "The teacher's last user message; holds `{prompt}` and, for the peer, `{solution}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        share, kind, length = self.live_share, self.teacher_model_kind, self.max_rollout_context_length
        require(share is None or 0 <= share <= 1, self, "live_share", "a number in [0, 1], or None")
        if share is not None and kind != "base":
            raise ValueError(
                f"live_share={share} with teacher_model_kind={kind!r}: the mix has weights of its own. Set "
                "teacher_model_kind='base', or live_share=None."
            )
        require(self.support_size is None or self.support_size >= 1, self, "support_size", "1 or more, or None")
        require(self.importance_cap > 0, self, "importance_cap", "a number above 0")
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")
        check_template("peer_prompt_template", self.peer_prompt_template, "{prompt}", "{solution}")

    def divergence_limits(self) -> dict[str, Any]:
        """The student's likeliest tokens and the rest."""
        from ..losses import Support

        return {"support": None if self.support_size is None else Support(self.support_size)}
