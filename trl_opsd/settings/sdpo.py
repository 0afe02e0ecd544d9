# SPDX-License-Identifier: Apache-2.0
"""Settings of SDPO (arXiv 2601.20802)."""

from dataclasses import dataclass
from typing import Any

from ..rows.texts import check_template
from ..user_functions import load_function
from .fields import option, require
from .groups import GroupSettings
from .moving import MovingTeacherSettings

PEER_PROMPT_TEMPLATE = "{prompt}{solution}\n\nSolve the problem."

PEER_BLOCK = """

A solution that was found right stands between the two marks.

=== Solution begins ===
{text}
=== Solution ends ==="""

FEEDBACK_BLOCK = """

What was reported about an earlier attempt stands between the two marks.

=== Report begins ===
{text}
=== Report ends ==="""


@dataclass
class SDPOSettings(GroupSettings, MovingTeacherSettings):
    """Defaults of the paper's runs without feedback that differ from OPSD's, and what SDPO alone reads.

    The gradient's norm and unrestricted sampling are ours.
    """

    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens.")
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
    engine_weight_cap: float | None = option(
        2.0, "Largest ratio of the policy that sampled to vLLM's copy of it, above 0; None for no correction."
    )
    strip_thinking: bool = option(True, "Remove think blocks from the rollouts that the teacher reads.")
    feedback_function: str | None = option(
        None,
        "`module:function`, your own, from a rollout (`trl_opsd.Rollout`, with its reward) to what an environment says of it, "
        "text or None. None takes the dataset's column `feedback`, where there is one.",
    )
    feedback_beside_peer: bool = option(
        False, "Show a rollout's feedback beside a right peer too, and not only where no peer is right."
    )
    max_rollout_context_length: int | None = option(
        None, "Budget of the peers and the feedback that the teacher reads, in tokens."
    )
    peer_prompt_template: str = option(
        PEER_PROMPT_TEMPLATE,
        "The teacher's last user message; holds `{prompt}` and, for the blocks below, `{solution}`.",
    )
    peer_block: str = option(PEER_BLOCK, "What stands around a right peer, `{text}`.")
    feedback_block: str = option(FEEDBACK_BLOCK, "What stands around feedback, `{text}`.")

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
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")
        check_weight_caps(self)
        check_feedback(self)
        check_template("peer_prompt_template", self.peer_prompt_template, "{prompt}", "{solution}")
        check_template("peer_block", self.peer_block, "{text}")

    def divergence_limits(self) -> dict[str, Any]:
        """The student's likeliest tokens and the rest."""
        from ..losses import Support

        return {"support": None if self.support_size is None else Support(self.support_size)}


def check_weight_caps(settings: Any) -> None:
    """Raise a ValueError for a cap of a token's weight outside its range."""
    require(settings.importance_cap > 0, settings, "importance_cap", "a number above 0")
    cap = settings.engine_weight_cap
    require(cap is None or cap > 0, settings, "engine_weight_cap", "a number above 0, or None")


def check_feedback(settings: Any) -> None:
    """Raise a ValueError where there is no such `feedback_function`, or where feedback has no place in its block."""
    name = settings.feedback_function
    if name is not None:
        load_function(name, "feedback_function", allowed="`module:function` or None", takes="a rollout")
    check_template("feedback_block", settings.feedback_block, "{text}")
