# SPDX-License-Identifier: Apache-2.0
"""Settings of MSD (arXiv 2605.02971)."""

from dataclasses import dataclass
from typing import Any

from ...rows.texts import check_template
from ...settings.fields import option, require

TRANSLATED_PROMPT_TEMPLATE = """{prompt}

The same request in English, for you alone:

{translation}

First consider in English whether it is safe to answer and what a safe answer is. Then answer in the language of the request, without mentioning the translation."""


@dataclass
class MSDSettings:
    """Defaults of the paper that differ from OPSD's, and what MSD alone reads.

    The paper's are the reverse KL, the top 32, the frozen teacher and the batch of 16, on one device here; the rest is OPSD's.
    """

    divergence: str = option("reverse_kl", "What is measured between teacher and student.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`.")
    gradient_accumulation_steps: int = option(4, "Micro-batches per optimizer step.")
    critical_top_k: int = option(
        32, "The teacher is sure by its entropy over so many of its likeliest tokens, at least 2."
    )
    translated_prompt_template: str = option(
        TRANSLATED_PROMPT_TEMPLATE, "The teacher's last user message; holds `{prompt}` and `{translation}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.critical_top_k >= 2, self, "critical_top_k", "2 or more")
        check_template("translated_prompt_template", self.translated_prompt_template, "{prompt}", "{translation}")

    def divergence_limits(self) -> dict[str, Any]:
        """The whole vocabulary; the entropy of the teacher's likeliest tokens is found beside it."""
        return {"entropy_top_k": self.critical_top_k}
