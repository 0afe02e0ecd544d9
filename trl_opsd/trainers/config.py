# SPDX-License-Identifier: Apache-2.0
"""Settings of the trainers: GRPOConfig plus the teacher, its prompt and the loss.

Defaults are the setting that OPSD's official code runs (arXiv 2601.18734, version 3) unless a field says otherwise.
"""

import warnings
from dataclasses import dataclass, fields

from trl import GRPOConfig

from .._trl.versions import allow_single_rollout, dict_fields, installed_fields
from ..monitoring.guard import GUARDS
from ..monitoring.markers import REFLECTION_MARKERS
from ..rewards import REWARD_ERRORS
from ..verification import check_verifier
from .settings import SelfDistillationSettings, option, require

# What only TRL's policy-gradient loss reads: without a reward in the loss these do nothing.
REWARD_ONLY_FIELDS = installed_fields(
    "beta",
    "delta",
    "entropy_coef",
    "entropy_coef_delta",
    "entropy_coef_max",
    "entropy_coef_min",
    "entropy_target",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "loss_type",
    "off_policy_mask_threshold",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "scale_rewards",
    "sync_ref_model",
    "top_entropy_quantile",
    "use_adaptive_entropy",
    "use_bias_correction_kl",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_mode",
)


@dataclass
class OPSDConfig(SelfDistillationSettings, GRPOConfig):
    """Settings of `OPSDTrainer`: every field of `trl.GRPOConfig`, some with other defaults, and the ones below.

    The defaults are those of arXiv 2601.18734, version 3: forward KL clipped per vocabulary entry at 0.05, one rollout
    a prompt of 1,024 tokens at temperature 1.1, thinking off for the student and on for the teacher, AdamW at 5e-6 for
    100 steps of 32 rollouts (4 a device times 8 accumulation steps: on N devices set
    `gradient_accumulation_steps=8/N`).

    Raises:
        ValueError: a field outside its range; the message names the field, its value and what to set instead.
    """

    _VALID_DICT_FIELDS = dict_fields(GRPOConfig)

    # Defaults of GRPOConfig that the method changes.
    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    max_grad_norm: float = option(0.1, "Largest gradient norm; larger ones are scaled down.")
    max_steps: int = option(100, "Optimizer steps. The papers stop early: long runs collapse.")
    save_steps: float = option(25, "Steps between checkpoints.")
    per_device_train_batch_size: int = option(4, "Rollouts per device and micro-batch.")
    gradient_accumulation_steps: int = option(8, "Micro-batches per optimizer step.")
    num_generations: int | None = option(1, "Rollouts per prompt. 1 is allowed unless a reward enters the loss.")
    max_completion_length: int | None = option(1024, "Longest rollout in tokens.")
    temperature: float = option(1.1, "Sampling temperature of the rollouts.")
    top_p: float = option(0.95, "Nucleus sampling: probability mass kept, in (0, 1].")
    top_k: int = option(20, "Sampling among the k likeliest tokens; 0 for all.")
    logging_first_step: bool = option(
        True, "Log the first step too: the untrained model's, which the guard compares with."
    )
    logging_nan_inf_filter: bool = option(
        False,
        "Leave losses that are not finite out of the logged mean. Off: they stop the run, and asking waits for the GPU.",
    )
    sample_distilled_only: bool = option(
        False,
        "Sampling stops where distillation does, so that no token is sampled in vain; rewards then see rollouts without "
        "their end. For methods and rewards that read the answer: off.",
    )

    # Scoring and rewards.
    offload_targets: bool = option(
        False,
        "Keep the targets' hidden states in host memory until their micro-batch. Changes no number; worth it where many "
        "long rollouts wait on a GPU.",
    )
    reward_weight: float = option(
        0.0, "Weight of TRL's policy-gradient loss beside the distillation; 0 leaves rewards to the log."
    )
    verifier: str = option(
        "math",
        "How answers are compared: `math` (math-verify), `exact` (as text, leading zeros count), `choice` (letters), or "
        "`module:function`, your own, of completion and solution.",
    )
    reward_errors: str = option(
        "raise",
        "When a reward function raises: `raise` stops the run and names the row, `skip` leaves such rows without a "
        "reward and counts them in the log as `rewards/NAME/errors`.",
    )

    # Diagnostics.
    decomposition_steps: int = option(
        0,
        "Optimizer steps between two measurements of how much of the teacher's signal the solution alone explains; 0 "
        "for none. Each scores three views of a few rollouts.",
    )
    reflection_markers: list[str] = option(list(REFLECTION_MARKERS), "Whole words counted per 1,000 tokens of rollout.")
    guard: str = option(
        "warn",
        "When length, entropy, divergence, markers or repetition leave the range of the start: `warn`, `stop` or `off`.",
    )

    def __post_init__(self):
        require(self.num_generations and self.num_generations >= 1, self, "num_generations", "1 or more")
        self._read_texts()
        if self.reward_weight == 0.0:
            # The correction costs a student forward a step and only TRL's policy-gradient loss uses it.
            self.vllm_importance_sampling_correction = False
        with allow_single_rollout(self):
            super().__post_init__()
        self._check_loss()
        self._check_teacher()
        self._check_rollouts()
        require(self.guard in GUARDS, self, "guard", f"one of {GUARDS}")
        self._warn_unused()

    def _check_rollouts(self) -> None:
        require(self.reward_weight >= 0, self, "reward_weight", "0 or more")
        check_verifier(self.verifier)
        require(self.reward_errors in REWARD_ERRORS, self, "reward_errors", f"one of {REWARD_ERRORS}")
        require(self.decomposition_steps >= 0, self, "decomposition_steps", "0 or more")
        if self.reward_weight > 0 and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} with reward_weight={self.reward_weight}: TRL's advantages "
                "need at least 2 rollouts a prompt. Set num_generations to 2 or more, or reward_weight to 0."
            )
        if self.sample_distilled_only:
            self._check_short_rollouts()
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} is not a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the loss is a mean over the tokens of a whole optimizer step, "
                "so they must be known when it starts. Set steps_per_generation to a multiple, or leave it unset."
            )

    def _check_short_rollouts(self) -> None:
        if self.distillation_length is None and self.distillation_length_start is None:
            raise ValueError(
                "sample_distilled_only=True has no length to stop at: set distillation_length, or distillation_length_start "
                "and distillation_length_steps; or lower max_completion_length alone."
            )
        for name, why in {
            "reward_weight": "a reward in the loss reads whole rollouts",
            "mask_truncated_completions": "it would leave out every rollout that is stopped",
        }.items():
            if getattr(self, name):
                raise ValueError(
                    f"sample_distilled_only=True with {name}={getattr(self, name)!r}: {why}. Leave one of them out."
                )

    def _warn_unused(self) -> None:
        if self.reward_weight > 0:
            return
        default = {f.name: f.default for f in fields(GRPOConfig)}
        moved = [name for name in REWARD_ONLY_FIELDS if getattr(self, name) != default[name]]
        if moved:
            warnings.warn(
                f"Set but unused, because they belong to TRL's policy-gradient loss and reward_weight is 0: "
                f"{', '.join(moved)}. Set reward_weight above 0 to use them.",
                stacklevel=4,
            )
