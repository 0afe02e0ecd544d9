# SPDX-License-Identifier: Apache-2.0
"""OGLS-SD: trainer and settings (arXiv 2605.12400)."""

from dataclasses import dataclass

from ..losses import LinearShape
from ..methods import OGLS_SD
from ..methods.ogls_sd import TEACHERS
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer
from .settings import option, require


@dataclass
class OGLSSDConfig(OPSDConfig):
    """Settings of `OGLSSDTrainer`: those of `OPSDConfig` with the paper's defaults, and the ones below.

    The paper gives neither shape nor length of lambda's ramp; ours is linear over `steering_warmup_steps`. Its KL direction
    is written one way and run, by a reader's report, the other: the default is forward, `reverse_kl` is offered.
    """

    clip: str | None = option("symmetric", "`upper`, `symmetric`, `token` or `none`.")
    num_generations: int | None = option(8, "Rollouts per prompt, at least 2.")
    max_completion_length: int | None = option(8192, "Longest rollout in tokens: long enough to reach an answer.")
    distillation_length: int | None = option(1024, "Only the first so many tokens of a rollout are distilled.")
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")
    steering_strength: float = option(3.0, "lambda at the end of its ramp, 0 or more.")
    steering_warmup_steps: int = option(50, "Optimizer steps over which lambda grows linearly; 0 for none.")
    steering_teacher: str = option(
        "steered", "`steered`, or the paper's ablations `positive_only` and `mean_of_positives`."
    )
    max_contexts_per_pool: int | None = option(None, "Most contexts of a pool, drawn with the run's seed.")
    max_rollout_context_length: int | None = option(None, "Budget of an inserted rollout in tokens.")
    strip_thinking: bool = option(False, "Remove think blocks from inserted rollouts.")

    def __post_init__(self):
        super().__post_init__()
        LinearShape(self.steering_strength)
        require(
            self.num_generations >= 2, self, "num_generations", "2 or more: right and wrong rollouts are contrasted"
        )
        require(self.steering_warmup_steps >= 0, self, "steering_warmup_steps", "0 or more")
        require(self.steering_teacher in TEACHERS, self, "steering_teacher", f"one of {TEACHERS}")
        for name in ("max_contexts_per_pool", "max_rollout_context_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, "1 or more, or None")


class OGLSSDTrainer(SelfDistillationTrainer):
    """Steers the teacher by verified right rollouts against wrong ones (arXiv 2605.12400).

    Takes the arguments of `trl.GRPOTrainer`. Rewards decide what is right: `reward_funcs`, or math-verify on `solution`.
    Rows may lack a solution. See `SelfDistillationTrainer`.
    """

    method = OGLS_SD
    config_class = OGLSSDConfig
