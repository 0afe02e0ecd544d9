# SPDX-License-Identifier: Apache-2.0
"""Settings of TRACE (arXiv 2605.10194)."""

from dataclasses import dataclass

from ...rows.texts import check_template
from ...settings.fields import option, require
from ...settings.groups import GroupSettings
from ...settings.moving import MovingTeacherSettings
from ...user_functions import load_function

TAKES = "a rollout"
SPANS = ("key", "error")

TYPE_PROMPT_TEMPLATE = """{prompt}

A remark on an earlier attempt at this problem, whose text you are not shown. What decided it was of this kind: {type}.

Solve the problem with that in mind. Put the final answer in \\boxed{}."""


@dataclass
class TRACESettings(GroupSettings, MovingTeacherSettings):
    """Defaults of the paper that differ from OPSD's, and what TRACE alone reads.

    The paper's are the schedule, the clips, the limit of a quarter, the copied teacher and the thinking. The length, the learning rate and
    the sampling are ours. Key spans with the forward KL are for a strong base; a weak one takes error spans with `reverse_kl`.
    """

    chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": True}, "Keyword arguments of the chat template for the student's prompt."
    )
    teacher_chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": True}, "Keyword arguments of the chat template for the teacher's prompt."
    )
    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    reward_weight: float = option(1.0, "Factor of GRPO's own advantage.")
    epsilon_high: float | None = option(0.28, "Upper bound of the ratio in TRL's policy-gradient loss, above 1.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens.")
    teacher_update_rate: float = option(
        1.0, "Share of the student in each update of the `ema` teacher, in (0, 1]; 1 copies it."
    )
    teacher_sync_steps: int | None = option(
        10, "Optimizer steps between two updates of the `ema` teacher; None for one update a generation batch."
    )
    distilled_spans: str = option(
        "key", "Which spans are distilled: `key` ones of right rollouts, or `error` ones of wrong ones."
    )
    span_weight: float = option(0.5, "w_0: lambda at the start, the weight of the divergence on spans, 0 or more.")
    span_hold_steps: int = option(10, "Optimizer steps for which lambda is w_0, 0 or more.")
    span_fall_steps: int = option(
        30, "Optimizer steps over which lambda then falls to 0, at least 1; after them this is GRPO."
    )
    max_span_share: float = option(0.25, "A rollout whose spans hold more of its tokens is not distilled, in (0, 1].")
    annotator_function: str | None = option(
        None,
        "Your annotator as `module:function`: from a rollout (see `trl_opsd.Rollout`) to a list of (start, end, kind, type), with "
        "places in characters of its completion, a kind `K` (key) or `E` (error), and a coarse type in words. None: the column "
        "`spans` holds such a list, of objects with the keys start, end, kind and type.",
    )
    type_prompt_template: str = option(
        TYPE_PROMPT_TEMPLATE, "The teacher's last user message; holds `{prompt}` and `{type}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.distilled_spans in SPANS, self, "distilled_spans", f"one of {SPANS}")
        require(self.span_weight >= 0, self, "span_weight", "0 or more")
        require(self.span_hold_steps >= 0, self, "span_hold_steps", "0 or more")
        require(self.span_fall_steps >= 1, self, "span_fall_steps", "1 or more")
        require(0 < self.max_span_share <= 1, self, "max_span_share", "above 0 and at most 1")
        if self.annotator_function is not None:
            load_function(self.annotator_function, "annotator_function", takes=TAKES)
        check_template("type_prompt_template", self.type_prompt_template, "{prompt}", "{type}")
