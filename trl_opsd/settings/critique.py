# SPDX-License-Identifier: Apache-2.0
"""Settings of step-aligned critique (arXiv 2606.11173)."""

from dataclasses import dataclass

from ..rows.texts import check_template
from ..user_functions import load_function
from .fields import option

TAKES = "a rollout"

CRITIQUE_PROMPT_TEMPLATE = """{prompt}

Somebody attempted this problem before, and a careful reader went through the attempt step by step: sound steps stand as they were, gaps are filled, and from the first fault on the reader went on in the writer's own manner. The result stands between the two marks.

=== Reviewed attempt begins ===
{solution}
=== Reviewed attempt ends ===

Solve the problem step by step. Put the final answer in \\boxed{}."""

CRITIC_PROMPT_TEMPLATE = """A problem, its reference solution and somebody's attempt follow. Rewrite the attempt step by step, and keep to its order and its manner.

The problem:

{prompt}

The reference solution:

{solution}

The attempt, which was checked and is {verdict}:

{attempt}

Copy every sound step as it stands. Where a step lacks its reason, insert the reason. If the attempt stops before its end, shorten what is long and finish it. From the first wrong step on, leave its text out without mentioning it, and go on correctly as the same writer would. Write the rewritten attempt alone."""


@dataclass
class CritiqueSDSettings:
    """What step-aligned critique alone reads, and the one default that differs from OPSD's.

    The paper as we know it states the forward KL and that every rollout is used. No clip is mentioned, so there is none; the rest is
    OPSD's, and so is that the teacher keeps the initial weights.
    """

    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`.")
    teacher_prompt_template: str = option(
        CRITIQUE_PROMPT_TEMPLATE,
        "The teacher's last user message; holds `{prompt}` and, for the critique, `{solution}`.",
    )
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")
    critique_function: str | None = option(
        None,
        "Your critic as `module:function`: from a rollout (see `trl_opsd.Rollout`) to a text, or to None. Without it critiques come "
        "from the column `critique`, or from the model itself.",
    )
    write_critique: bool = option(
        False, "The model writes the critique itself, with the teacher's weights; with vLLM, with the student's."
    )
    critic_prompt_template: str = option(
        CRITIC_PROMPT_TEMPLATE,
        "What the model answers where it is its own critic; holds `{prompt}`, `{solution}`, `{attempt}` and `{verdict}`.",
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        slots = ("{prompt}", "{solution}", "{attempt}", "{verdict}")
        check_template("critic_prompt_template", self.critic_prompt_template, *slots)
        if self.critique_function is None:
            return
        load_function(self.critique_function, "critique_function", takes=TAKES)
        if self.write_critique:
            raise ValueError(
                f"critique_function={self.critique_function!r} with write_critique=True: a rollout has one critique. Set "
                "write_critique=False, or leave critique_function unset."
            )
