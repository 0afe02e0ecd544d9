# SPDX-License-Identifier: Apache-2.0
"""The config on which every method's stands: TRL's GRPOConfig with this package's settings in front.

Defaults are the setting that OPSD's official code runs (arXiv 2601.18734, version 3) unless a field says otherwise.
"""

import warnings
from dataclasses import dataclass, fields
from typing import Any

from trl import GRPOConfig

from .._trl.versions import allow_single_rollout, dict_fields, engine_correction, installed_fields, is_newer
from ..settings.fields import check_settings, require
from ..settings.opsd import OPSDSettings

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
class OPSDConfig(OPSDSettings, GRPOConfig):
    """Settings of `OPSDTrainer`: every field of `trl.GRPOConfig`, some with other defaults, and `OPSDSettings`.

    The defaults are those of arXiv 2601.18734, version 3: forward KL clipped per vocabulary entry at 0.05, one rollout
    a prompt of 1,024 tokens at temperature 1.1, thinking off for the student and on for the teacher, AdamW at 5e-6 for
    100 steps of 32 rollouts (4 a device times 8 accumulation steps: on N devices set
    `gradient_accumulation_steps=8/N`).

    Raises:
        ValueError: a field outside its range; the message names the field, its value and what to set instead.
    """

    _VALID_DICT_FIELDS = dict_fields(GRPOConfig)

    def __post_init__(self):
        require(self.num_generations and self.num_generations >= 1, self, "num_generations", "1 or more")
        self.read_texts()
        self._choose_engine_correction()
        with allow_single_rollout(self):
            super().__post_init__()
        check_settings(self)
        self._check_steps()
        self._warn_unused()
        self._warn_of_biased_weights()

    def _choose_engine_correction(self) -> None:
        """The correction costs a student forward a step, so it is taken only where a loss reads it."""
        chosen = self._engine_correction()
        for name, value in chosen.items():
            setattr(self, name, value)
        if not chosen and self.reward_weight == 0.0:
            self.vllm_importance_sampling_correction = False

    def _engine_correction(self) -> dict[str, Any]:
        """TRL's fields that a method's `engine_weight_cap` sets."""
        cap = getattr(self, "engine_weight_cap", None)
        return {} if cap is None else engine_correction(cap)

    def _check_steps(self) -> None:
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} is not a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the loss is a mean over the tokens of a whole optimizer step, "
                "so they must be known when it starts. Set steps_per_generation to a multiple, or leave it unset."
            )

    def _warn_unused(self) -> None:
        if self.reward_weight > 0:
            return
        default = {f.name: f.default for f in fields(GRPOConfig)}
        read = {*self._engine_correction(), *getattr(self, "policy_fields", ())}  # by the method, without a reward too
        unused = [name for name in REWARD_ONLY_FIELDS if name not in read]
        moved = [name for name in unused if getattr(self, name) != default[name]]
        if moved:
            warnings.warn(
                f"Set but unused, because they belong to TRL's policy-gradient loss and reward_weight is 0: "
                f"{', '.join(moved)}. Set reward_weight above 0 to use them.",
                stacklevel=4,
            )

    def _warn_of_biased_weights(self) -> None:
        """TRL's weight of trainer over engine has the mass that sampling kept as a factor, until 1.17."""
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": (self.min_p or 0) > 0}
        cut = [f"{name}={getattr(self, name)}" for name, is_cut in cuts.items() if is_cut]
        if self.use_vllm and self.vllm_importance_sampling_correction and cut and not is_newer((1, 16)):
            warnings.warn(
                f"vLLM samples with {' and '.join(cut)}, and TRL before 1.17 compares the trainer's probability over the whole "
                "vocabulary with the engine's over the tokens that were kept: every weight is too small by the kept mass. Set "
                "top_p=1 and top_k=0, or vllm_importance_sampling_correction=False (engine_weight_cap=None where the method has "
                "it).",
                stacklevel=4,
            )
