# SPDX-License-Identifier: Apache-2.0
"""Settings of OPSD (arXiv 2601.18734), on which those of the other methods stand: rollouts, rewards and diagnostics."""

from dataclasses import dataclass

from .fields import option, require
from .privileged import PrivilegedTextSettings
from .shared import AnswerSettings, SelfDistillationSettings


@dataclass
class OPSDSettings(PrivilegedTextSettings, SelfDistillationSettings, AnswerSettings):
    """What OPSD's official code runs, version 3, where GRPOConfig has another default; rollouts, rewards, diagnostics."""

    # Defaults of GRPOConfig that the method changes.
    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    max_grad_norm: float = option(0.1, "Largest gradient norm; larger ones are scaled down.")
    max_steps: int = option(100, "Optimizer steps. The papers stop early: long runs collapse.")
    save_steps: float = option(25, "Steps between checkpoints.")
    per_device_train_batch_size: int = option(4, "Rollouts per device and micro-batch.")
    gradient_accumulation_steps: int = option(8, "Micro-batches per optimizer step.")
    num_generations: int | None = option(1, "Rollouts per prompt. 1 is allowed unless a reward enters the loss.")
    max_completion_length: int | None = option(1024, "Longest rollout in tokens.")
    top_p: float = option(0.95, "Nucleus sampling: probability mass kept, in (0, 1].")
    top_k: int = option(20, "Sampling among the k likeliest tokens; 0 for all.")
    logging_first_step: bool = option(
        True, "Log the first step too: the untrained model's, which the guard compares with."
    )
    logging_nan_inf_filter: bool = option(
        False,
        "Leave losses that are not finite out of the logged mean. Off: they stop the run, and asking waits for the GPU.",
    )
    # Rewards and diagnostics.
    reward_weight: float = option(
        0.0, "Weight of TRL's policy-gradient loss beside the distillation; 0 leaves rewards to the log."
    )
    guard: str = option(
        "warn",
        "When length, entropy, divergence, markers or repetition leave the range of the start: `warn`, `stop` or `off`.",
    )

    def check(self) -> None:
        """Raise a ValueError for a setting of rollouts, rewards or diagnostics outside its range."""
        from ..monitoring.guard import GUARDS

        require(self.guard in GUARDS, self, "guard", f"one of {GUARDS}")
        require(self.reward_weight >= 0, self, "reward_weight", "0 or more")
        if self.reward_weight > 0 and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} with reward_weight={self.reward_weight}: TRL's advantages "
                "need at least 2 rollouts a prompt. Set num_generations to 2 or more, or reward_weight to 0."
            )
        self._check_control()

    def _check_control(self) -> None:
        control = self.solution_control
        if control is not None and self.teacher_prompt_function is not None:
            raise ValueError(
                f"shown_solution={control!r} with teacher_prompt_template={self.teacher_prompt_function!r}: what the function "
                "writes has no place for a solution. Give a template, or leave shown_solution 1.0."
            )
        if control == "shortest_rollout" and self.num_generations < 2:
            raise ValueError(
                f"shown_solution={control!r} with num_generations={self.num_generations}: a rollout alone has no other. Set "
                "num_generations to 2 or more."
            )
