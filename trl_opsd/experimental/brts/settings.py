# SPDX-License-Identifier: Apache-2.0
"""Settings of BRTS (arXiv 2605.09725)."""

from dataclasses import dataclass
from typing import Any

from ...rows.texts import check_template
from ...settings.fields import option, require

GUIDED_PROMPT_TEMPLATE = """{prompt}

So that you can check your result, a solution stands between the two marks.

=== Solution for checking begins ===
{solution}
=== Solution for checking ends ===

Derive everything from the problem itself. Use the solution in silence, to check the result that you have reached, and never mention that you were shown one. Put the final answer in \\boxed{}."""

FALLBACKS = ("most_similar", "skip")


@dataclass
class BRTSSettings:
    """Defaults of the official script that differ from OPSD's, and what BRTS alone reads.

    The weight of 10 is the paper's; the script switches its second divergence off. The gradient's norm, the uncut sampling of
    rollouts and the threshold of a right answer are ours.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    gradient_accumulation_steps: int = option(32, "Micro-batches per optimizer step.")
    max_grad_norm: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    num_generations: int | None = option(2, "Rollouts per prompt, each with candidates of its own; 1 or more.")
    max_completion_length: int | None = option(7168, "Longest rollout, and longest candidate, in tokens.")
    temperature: float = option(1.0, "Sampling temperature of the rollouts, and of the loss.")
    top_p: float = option(1.0, "Nucleus sampling of the rollouts: probability mass kept, in (0, 1].")
    top_k: int = option(0, "Sampling among the k likeliest tokens; 0 for all.")
    teacher_chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": False}, "Keyword arguments of the chat template for the teacher's prompt."
    )
    divergence: str = option("reverse_kl", "What is measured between teacher and student on the rollouts.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`, on the rollouts.")
    reward_threshold: float = option(0.5, "A candidate is right if its reward is at least this.")
    support_size: int = option(
        16,
        "Each divergence is over so many likeliest tokens and one entry for the rest: the student's on rollouts, the teacher's on "
        "candidates. A candidate overlaps where its token is among so many of the student's.",
    )
    candidate_weight: float = option(
        10.0, "l: weight of KL(teacher || student) on the chosen candidates; 0 for none, and no candidates are written."
    )
    num_candidates: int = option(2, "N: answers of the teacher to its own prompt, for each rollout; 1 or more.")
    num_guided_candidates: int = option(
        1, "Further answers where none of the N is right, to `guided_prompt_template`; 0 for none."
    )
    candidate_fallback: str = option(
        "most_similar",
        "Where no candidate is right: `most_similar` takes the one of the N with the most overlap, `skip` none.",
    )
    candidate_temperature: float = option(0.7, "Sampling temperature of the candidates, above 0.")
    candidate_top_p: float = option(0.95, "Nucleus sampling of the candidates: probability mass kept, in (0, 1].")
    guided_prompt_template: str = option(
        GUIDED_PROMPT_TEMPLATE, "The user message of a guided candidate; holds `{prompt}` and `{solution}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.support_size >= 1, self, "support_size", "1 or more")
        require(self.candidate_weight >= 0, self, "candidate_weight", "0 or more")
        require(self.num_candidates >= 1, self, "num_candidates", "1 or more")
        require(self.num_guided_candidates >= 0, self, "num_guided_candidates", "0 or more")
        require(self.candidate_fallback in FALLBACKS, self, "candidate_fallback", f"one of {FALLBACKS}")
        require(self.candidate_temperature > 0, self, "candidate_temperature", "a number above 0")
        require(0 < self.candidate_top_p <= 1, self, "candidate_top_p", "a number above 0 and at most 1")
        check_template("guided_prompt_template", self.guided_prompt_template, "{prompt}", "{solution}")

    def divergence_limits(self) -> dict[str, Any]:
        """The student's likeliest tokens and the rest, on rollouts."""
        from ...losses import Support

        return {"support": Support(self.support_size)}
