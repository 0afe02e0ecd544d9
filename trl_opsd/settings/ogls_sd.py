# SPDX-License-Identifier: Apache-2.0
"""Settings of OGLS-SD (arXiv 2605.12400)."""

from dataclasses import dataclass

from .fields import option, require

TEACHERS = ("steered", "positive_only", "mean_of_positives")


@dataclass
class OGLSSDSettings:
    """Defaults of the paper that differ from OPSD's, and what OGLS-SD alone reads.

    The paper gives neither shape nor length of lambda's ramp; ours is linear over `steering_warmup_steps`. Its KL direction
    is written one way and run, by a reader's report, the other: the default is forward, `reverse_kl` is offered.
    """

    clip: str | None = option("symmetric", "`upper`, `symmetric`, `token` or `none`.")
    num_generations: int | None = option(8, "Rollouts per prompt, at least 2.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens: long enough to reach an answer.")
    distillation_length: int | str | None = option(1024, "As in `OPSDConfig`; whole rollouts are sampled.")
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")
    steering_strength: float = option(3.0, "lambda at the end of its ramp, 0 or more.")
    steering_warmup_steps: int = option(50, "Optimizer steps over which lambda grows linearly; 0 for none.")
    steering_teacher: str = option(
        "steered", "`steered`, or the paper's ablations `positive_only` and `mean_of_positives`."
    )
    max_contexts_per_pool: int | None = option(None, "Most contexts of a pool, drawn with the run's seed.")
    max_rollout_context_length: int | None = option(None, "Budget of an inserted rollout in tokens.")
    strip_thinking: bool = option(False, "Remove think blocks from inserted rollouts.")

    def check(self) -> None:
        """Raise a ValueError for a setting of the method outside its range."""
        from ..losses import LinearShape

        LinearShape(self.steering_strength)
        enough = self.num_generations and self.num_generations >= 2
        require(enough, self, "num_generations", "2 or more: right and wrong rollouts are contrasted")
        require(self.steering_warmup_steps >= 0, self, "steering_warmup_steps", "0 or more")
        require(self.steering_teacher in TEACHERS, self, "steering_teacher", f"one of {TEACHERS}")
        for name in ("max_contexts_per_pool", "max_rollout_context_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, "1 or more, or None")
