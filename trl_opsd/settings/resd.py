# SPDX-License-Identifier: Apache-2.0
"""Settings of RESD (arXiv 2605.12741)."""

from dataclasses import dataclass
from typing import Any

from ..rows.texts import check_template
from .fields import option, require
from .moving import MovingTeacherSettings
from .playbook import PlaybookSettings
from .sdpo import FEEDBACK_BLOCK, check_feedback, check_weight_caps

ATTEMPT_BLOCK = """

An earlier attempt of yours stands between the two marks.

=== Attempt begins ===
{text}
=== Attempt ends ==="""

REVIEW_BLOCK = """

What you have since written about this attempt stands between the two marks.

=== Review begins ===
{text}
=== Review ends ==="""

SOLUTION_BLOCK = """

A solution of yours that was found right stands between the two marks.

=== Solution begins ===
{text}
=== Solution ends ==="""

REVIEW_PROMPT_TEMPLATE = """{prompt}{solution}

The attempt was found wrong. Name the first step that went wrong, say why it did, and say what to do instead. Do not solve the problem again."""

EXPERIENCE_PROMPT_TEMPLATE = "{prompt}{solution}\n\nSolve the problem, and do not repeat what went wrong before."


@dataclass
class RESDSettings(PlaybookSettings, MovingTeacherSettings):
    """Defaults of the official script for MANUFACTORIA that differ from OPSD's, and what RESD alone reads.

    The gradient's norm and the number of kept solutions are ours. The scripts for FINER and the easy simulations take
    `divergence="jsd"`, that for FINER a learning rate of 1e-5; the one for the medium simulations takes no `balance_outcomes` and
    a `teacher_update_rate` of 0.01.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    warmup_steps: float = option(10, "Optimizer steps of warm-up; below 1 a share of all.")
    max_grad_norm: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": True}, "Keyword arguments of the chat template for the student's prompt."
    )
    max_completion_length: int | None = option(20_480, "Longest rollout, and longest review, in tokens.")
    temperature: float = option(1.0, "Sampling temperature of the rollouts, and of the loss.")
    top_k: int = option(0, "Sampling among the k likeliest tokens; 0 for all.")
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")
    teacher_update_rate: float = option(1e-4, "Share of the student in each update of the `ema` teacher, in (0, 1].")
    divergence: str = option("reverse_kl", "What is measured between teacher and student.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`.")
    support_size: int | None = option(
        100,
        "The divergence is over so many of the student's likeliest tokens and one entry for the rest; None for all.",
    )
    target_share_floor: float = option(
        0.2, "eps, in [0, 1): the teacher's probability counts as at least this share of the student's; 0 for no floor."
    )
    balance_outcomes: bool = option(
        True, "Weigh right rollouts by the share of wrong ones in the batch and wrong ones by that of right ones."
    )
    importance_cap: float = option(2.0, "Largest ratio of the student to the policy that sampled, above 0.")
    engine_weight_cap: float | None = option(
        2.0, "Largest ratio of the policy that sampled to vLLM's copy of it, above 0; None for no correction."
    )
    strip_thinking: bool = option(True, "Remove think blocks from what the teacher reads of rollouts and reviews.")
    feedback_function: str | None = option(
        None,
        "`module:function`, your own, from a rollout (`trl_opsd.Rollout`, with its reward) to what an environment says of it, "
        "text or None. None takes the dataset's column `feedback`, where there is one.",
    )
    write_review: bool = option(True, "The model reviews a wrong rollout before the teacher scores it.")
    max_kept_solutions: int = option(
        1000, "Prompts whose last right rollout is kept and shown; the ones kept longest ago go first; 0 for none."
    )
    max_rollout_context_length: int | None = option(None, "Budget of all that the teacher reads of these, in tokens.")
    review_prompt_template: str = option(
        REVIEW_PROMPT_TEMPLATE,
        "What the model answers about a wrong rollout; holds `{prompt}` and `{solution}`, the blocks.",
    )
    experience_prompt_template: str = option(
        EXPERIENCE_PROMPT_TEMPLATE, "The teacher's last user message; holds `{prompt}` and `{solution}`, the blocks."
    )
    attempt_block: str = option(ATTEMPT_BLOCK, "What stands around the rollout itself, `{text}`.")
    feedback_block: str = option(FEEDBACK_BLOCK, "What stands around feedback, `{text}`.")
    review_block: str = option(REVIEW_BLOCK, "What stands around the review, `{text}`.")
    solution_block: str = option(SOLUTION_BLOCK, "What stands around the right rollout, `{text}`.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        length = self.max_rollout_context_length
        require(0 <= self.target_share_floor < 1, self, "target_share_floor", "a number in [0, 1)")
        require(self.support_size is None or self.support_size >= 1, self, "support_size", "1 or more, or None")
        require(self.max_kept_solutions >= 0, self, "max_kept_solutions", "0 or more")
        require(length is None or length >= 1, self, "max_rollout_context_length", "1 or more, or None")
        check_weight_caps(self)
        check_feedback(self)
        for name in ("review_prompt_template", "experience_prompt_template"):
            check_template(name, getattr(self, name), "{prompt}", "{solution}")
        for name in ("attempt_block", "review_block", "solution_block"):
            check_template(name, getattr(self, name), "{text}")

    def divergence_limits(self) -> dict[str, Any]:
        """The student's likeliest tokens and the rest, under the floor."""
        from ..losses import Support

        support = None if self.support_size is None else Support(self.support_size)
        return {"support": support, "relative_floor": self.target_share_floor or None}
