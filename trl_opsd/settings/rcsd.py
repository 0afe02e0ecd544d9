# SPDX-License-Identifier: Apache-2.0
"""Settings of RCSD (arXiv 2606.19327)."""

from dataclasses import dataclass
from typing import Any

from ..rows.texts import check_template
from .fields import option, require

ANALYSIS_PROMPT_TEMPLATE = """{prompt}

An answer to this problem that may be incomplete stands between the two marks.

=== Answer begins ===
{solution}
=== Answer ends ==={guidance}

Say briefly what a good solution has to do: requirements, limits, and the steps of reasoning that must not be missing. Do not solve the problem."""

BRIDGE = """

So much for what is required, which is for me alone. Now I solve the problem afresh, from its statement and by my own reasoning, and mention neither an answer that I was given, nor requirements, nor this analysis. The final answer goes in \\boxed{}.

"""

GUIDED_PROMPT_TEMPLATE = """{prompt}

An answer to this problem that may be incomplete stands between the two marks.

=== Answer begins ===
{solution}
=== Answer ends ==={guidance}

All of this is for you alone. Solve the problem afresh, from its statement and by your own reasoning, and reach the result only where the reasoning does. Mention neither the answer, nor requirements, nor notes, nor that you were given any. Put the final answer in \\boxed{}."""


@dataclass
class RCSDSettings:
    """Defaults of the paper that differ from OPSD's, and what RCSD alone reads."""

    chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": True}, "Keyword arguments of the chat template for the student's prompt."
    )
    max_completion_length: int | None = option(4096, "Longest rollout, and longest analysis, in tokens.")
    temperature: float = option(1.2, "Sampling temperature of the rollouts, and of the loss.")
    support_size: int | None = option(
        20, "Tokens that are compared, the teacher's likeliest, both sides renormalised; None for all."
    )
    write_analysis: bool = option(True, "The model writes what the guidance requires before the teacher scores.")
    analysis_prompt_template: str = option(
        ANALYSIS_PROMPT_TEMPLATE, "What the model answers first; holds `{prompt}`, `{solution}` and `{guidance}`."
    )
    bridge: str = option(
        BRIDGE, "What stands in the teacher's turn behind its analysis and before the rollout: not to cite any of it."
    )
    guided_prompt_template: str = option(
        GUIDED_PROMPT_TEMPLATE,
        "The teacher's last user message where no analysis is written; holds `{prompt}`, `{solution}` and `{guidance}`.",
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.support_size is None or self.support_size >= 1, self, "support_size", "1 or more, or None")
        for name in ("analysis_prompt_template", "guided_prompt_template"):
            check_template(name, getattr(self, name), "{prompt}", "{solution}", "{guidance}")

    def divergence_limits(self) -> dict[str, Any]:
        """The teacher's likeliest tokens alone."""
        from ..losses import Support

        whole = self.support_size is None
        return {"support": None if whole else Support(self.support_size, of="target", remainder="renormalise")}
