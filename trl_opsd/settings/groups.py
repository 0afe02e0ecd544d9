# SPDX-License-Identifier: Apache-2.0
"""Settings of the methods that sample groups as GRPO's papers do."""

from dataclasses import dataclass

from .fields import option, require


@dataclass
class GroupSettings:
    """Groups of rollouts, sampled at temperature 1 without a cut, some of them right."""

    max_grad_norm: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    num_generations: int | None = option(8, "Rollouts per prompt, at least 2.")
    temperature: float = option(1.0, "Sampling temperature of the rollouts.")
    top_p: float = option(1.0, "Nucleus sampling: probability mass kept, in (0, 1].")
    top_k: int = option(0, "Sampling among the k likeliest tokens; 0 for all.")
    teacher_chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": False}, "Keyword arguments of the chat template for the teacher's prompt."
    )
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        enough = self.num_generations and self.num_generations >= 2
        require(enough, self, "num_generations", "2 or more: the method compares the rollouts of a prompt")
