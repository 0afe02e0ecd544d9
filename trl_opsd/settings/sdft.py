# SPDX-License-Identifier: Apache-2.0
"""Settings of SDFT (arXiv 2601.19897)."""

from dataclasses import dataclass

from .fields import option, require
from .moving import MovingTeacherSettings

DEMONSTRATION_PROMPT_TEMPLATE = """{prompt}

An example of an answer to this stands between the two marks.

=== Example begins ===
{solution}
=== Example ends ===

Answer in your own words, in the way of the example."""


@dataclass
class SDFTSettings(MovingTeacherSettings):
    """Defaults of the paper that differ from OPSD's, and what SDFT alone reads.

    The number of steps, the gradient's norm and unrestricted sampling at temperature 1 are ours. That the weights of the
    teacher are a moving average is what readers report of the authors' code.
    """

    learning_rate: float = option(2e-5, "Initial learning rate of AdamW.")
    lr_scheduler_type: str = option("cosine", "How the learning rate changes over the run.")
    warmup_steps: float = option(0.1, "Optimizer steps of warm-up; below 1 a share of all.")
    max_grad_norm: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    temperature: float = option(1.0, "Sampling temperature of the rollouts, and of the loss.")
    top_p: float = option(1.0, "Nucleus sampling: probability mass kept, in (0, 1].")
    top_k: int = option(0, "Sampling among the k likeliest tokens; 0 for all.")
    clip: str | None = option(None, "`upper`, `symmetric`, `token` or `none`.")
    num_loss_tokens_to_skip: int = option(3, "So many first tokens of a rollout are not distilled.")
    engine_weight_cap: float | None = option(
        2.0, "Largest ratio of the policy that sampled to vLLM's copy of it, above 0; None for no correction."
    )
    teacher_sync_steps: int | None = option(
        1, "Optimizer steps between two updates of the `ema` teacher; None for one update a generation batch."
    )
    teacher_update_rate: float = option(0.01, "Share of the student in each update of the `ema` teacher, in (0, 1].")
    teacher_prompt_template: str = option(
        DEMONSTRATION_PROMPT_TEMPLATE,
        "The teacher's last user message; holds `{prompt}` and `{solution}`, the example.",
    )
    teacher_chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": False}, "Keyword arguments of the chat template for the teacher's prompt."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        cap = self.engine_weight_cap
        require(cap is None or cap > 0, self, "engine_weight_cap", "a number above 0, or None")
