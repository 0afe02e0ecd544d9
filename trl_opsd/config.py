# SPDX-License-Identifier: Apache-2.0
"""Settings of the trainers: GRPOConfig plus the teacher, its prompt and the loss.

Defaults are the setting that OPSD's official code runs (arXiv 2601.18734, version 3) unless a field says otherwise.
"""

import json
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from ._trl import DICT_FIELDS, allow_single_rollout, installed_fields
from .callbacks import GUARDS
from .contexts import (
    REFERENCE_PROMPT_TEMPLATE,
    SHORTEN_CHOICES,
    TEACHER_PROMPT_TEMPLATE,
    check_template,
)
from .losses import Divergence
from .markers import REFLECTION_MARKERS
from .rewards import REWARD_ERRORS
from .teacher import TEACHER_KINDS

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


def option(default: Any, help_text: str) -> Any:
    """A config field with a default and its help text."""
    factory = isinstance(default, (dict, list))
    keywords = {"default_factory": lambda: default.copy()} if factory else {"default": default}
    return field(metadata={"help": help_text}, **keywords)


@dataclass
class OPSDConfig(GRPOConfig):
    """Settings of `OPSDTrainer`: every field of `trl.GRPOConfig`, some with other defaults, and the ones below.

    The defaults are those of arXiv 2601.18734, version 3: forward KL clipped per vocabulary entry at 0.05, one rollout
    a prompt of 1,024 tokens at temperature 1.1, thinking off for the student and on for the teacher, AdamW at 5e-6 for
    100 steps of 32 rollouts (4 a device times 8 accumulation steps: on N devices set
    `gradient_accumulation_steps=8/N`).

    Raises:
        ValueError: a field outside its range; the message names the field, its value and what to set instead.
    """

    _VALID_DICT_FIELDS = [*DICT_FIELDS, "teacher_chat_template_kwargs"]  # noqa: RUF012

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
    chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": False}, "Keyword arguments of the chat template for the student's prompt."
    )

    # Not in `repr`, unlike in TRL's own configs.
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token to push with; best left unset, then the one of `hf auth login` or HF_TOKEN is used."},
    )

    # The student's prompt.
    prompt_template: str | None = option(
        None,
        "Rewrites the last user message before sampling; holds `{prompt}`. None takes the dataset's prompt as it is.",
    )

    # The teacher.
    teacher_model_kind: str = option(
        "base",
        "Whose weights the teacher has: `base` the initial ones, `live` the student's, `ema` a moving average.",
    )
    teacher_update_rate: float = option(0.001, "Share of the student in each update of the `ema` teacher, in (0, 1].")
    teacher_sync_steps: int = option(1, "Optimizer steps between two updates of the `ema` teacher.")
    teacher_prompt_template: str = option(
        TEACHER_PROMPT_TEMPLATE,
        "The teacher's last user message; holds `{solution}` and, for a privileged teacher, `{prompt}`.",
    )
    reference_prompt_template: str = option(
        REFERENCE_PROMPT_TEMPLATE, "The user message of a teacher that sees the solution but not the problem."
    )
    teacher_chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": True}, "Keyword arguments of the chat template for the teacher's prompt."
    )
    teacher_prefix: str | None = option(
        None, "Text that opens the teacher's turn, before the rollout (for instance an empty think block)."
    )
    max_teacher_prompt_length: int | None = option(
        None, "Longest teacher prompt in tokens; a longer one has its solution shortened. None for no limit."
    )
    solution_shortening: str = option("middle", "Where a too long solution loses text: `middle` or `end`.")
    teacher_tokens_per_forward: int = option(
        32_768, "Tokens, padding and cached ones included, that one teacher forward may hold."
    )
    share_contexts: bool = option(
        True,
        "Read a teacher context once for all rollouts it is used on. Changes no target, only the time of scoring.",
    )

    # The loss.
    divergence: str = option("forward_kl", "`forward_kl` KL(teacher, student), `reverse_kl` or `jsd`.")
    jsd_weight: float = option(0.5, "Weight of the target in the mixture of `jsd`, in (0, 1).")
    clip: str | None = option(
        "upper",
        "`upper` or `symmetric` clip each vocabulary entry's term, `token` the position's sum; `none` does not clip.",
    )
    clip_value: float = option(0.05, "Bound of the clip in nats, above 0.")
    loss_temperature: float | None = option(
        None, "Divides both models' logits in the loss. None takes the sampling `temperature`."
    )
    loss_reduction: str = option(
        "token", "`token`: mean over all tokens of the optimizer step; `sequence`: mean of each rollout's mean."
    )
    distillation_length: int | None = option(
        None, "Only the first so many tokens of a rollout are distilled. None for all."
    )
    num_loss_tokens_to_skip: int = option(0, "So many first tokens of a rollout are not distilled.")
    reward_weight: float = option(
        0.0, "Weight of TRL's policy-gradient loss beside the distillation; 0 leaves rewards to the log."
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
        for name in ("chat_template_kwargs", "teacher_chat_template_kwargs"):
            require(_is_json_object(getattr(self, name)), self, name, "a JSON object or None")
        if isinstance(self.clip, str) and self.clip.lower() == "none":
            self.clip = None
        if self.reward_weight == 0.0:
            # The correction costs a student forward a step and only TRL's policy-gradient loss uses it.
            self.vllm_importance_sampling_correction = False
        with allow_single_rollout(self):
            super().__post_init__()
        if self.loss_temperature is None:
            self.loss_temperature = self.temperature
        self._check_loss()
        self._check_teacher()
        self._check_rollouts()
        require(self.guard in GUARDS, self, "guard", f"one of {GUARDS}")
        self._warn_unused()

    def __getstate__(self) -> dict[str, Any]:
        """The settings without tokens: HF Trainer pickles them into `training_args.bin`, which a push uploads."""
        return _without_model_token({**self.__dict__, "hub_token": None})

    def to_dict(self) -> dict[str, Any]:
        """The settings as trackers get them, without tokens."""
        return _without_model_token(super().to_dict())

    def loss_divergence(self) -> Divergence:
        """The divergence of the loss with its temperature and clip.

        Raises:
            ValueError: one of its fields is outside its range.
        """
        return Divergence(
            name=self.divergence,
            jsd_weight=self.jsd_weight,
            temperature=self.loss_temperature,
            clip=self.clip,
            clip_value=self.clip_value,
        )

    def _check_loss(self) -> None:
        require(self.temperature > 0, self, "temperature", "a number above 0")
        require(self.loss_temperature > 0, self, "loss_temperature", "a number above 0, or None")
        self.loss_divergence()
        require(self.loss_reduction in ("token", "sequence"), self, "loss_reduction", "'token' or 'sequence'")
        require(self.reward_weight >= 0, self, "reward_weight", "0 or more")
        require(self.reward_errors in REWARD_ERRORS, self, "reward_errors", f"one of {REWARD_ERRORS}")
        require(self.num_loss_tokens_to_skip >= 0, self, "num_loss_tokens_to_skip", "0 or more")
        length, longest = self.distillation_length, self.max_completion_length
        require(length is None or length > 0, self, "distillation_length", "a positive number of tokens, or None")
        for name in ("distillation_length", "max_completion_length"):
            limit = getattr(self, name)
            if limit is not None and self.num_loss_tokens_to_skip >= limit:
                raise ValueError(
                    f"num_loss_tokens_to_skip={self.num_loss_tokens_to_skip} leaves nothing of {name}={limit}. Skip "
                    "fewer tokens or distil more."
                )
        if None not in (length, longest) and length > longest:
            warnings.warn(
                f"distillation_length={length} is above max_completion_length={longest}; "
                "every token of a rollout is distilled.",
                stacklevel=4,
            )

    def _check_teacher(self) -> None:
        require(self.teacher_model_kind in TEACHER_KINDS, self, "teacher_model_kind", f"one of {TEACHER_KINDS}")
        require(0 < self.teacher_update_rate <= 1, self, "teacher_update_rate", "above 0 and at most 1")
        require(self.decomposition_steps >= 0, self, "decomposition_steps", "0 or more")
        require(self.teacher_sync_steps >= 1, self, "teacher_sync_steps", "1 or more")
        require(self.solution_shortening in SHORTEN_CHOICES, self, "solution_shortening", f"one of {SHORTEN_CHOICES}")
        require(self.teacher_tokens_per_forward >= 1, self, "teacher_tokens_per_forward", "1 or more")
        budget = self.max_teacher_prompt_length
        require(budget is None or budget >= 1, self, "max_teacher_prompt_length", "1 or more, or None")
        check_template("teacher_prompt_template", self.teacher_prompt_template, "{prompt}", "{solution}")
        check_template("reference_prompt_template", self.reference_prompt_template, "{solution}")
        if self.prompt_template is not None:
            check_template("prompt_template", self.prompt_template, "{prompt}")

    def _check_rollouts(self) -> None:
        if self.reward_weight > 0 and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} with reward_weight={self.reward_weight}: TRL's advantages "
                "need at least 2 rollouts a prompt. Set num_generations to 2 or more, or reward_weight to 0."
            )
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
        moved = [name for name in REWARD_ONLY_FIELDS if getattr(self, name) != default[name]]
        if moved:
            warnings.warn(
                f"Set but unused, because they belong to TRL's policy-gradient loss and reward_weight is 0: "
                f"{', '.join(moved)}. Set reward_weight above 0 to use them.",
                stacklevel=4,
            )


def _is_json_object(value: Any) -> bool:
    """None, a dict, or the text of one as the command line gives it (TRL parses it)."""
    if not isinstance(value, str):
        return value is None or isinstance(value, dict)
    try:
        return value.startswith("{") and isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _without_model_token(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, without the token that `from_pretrained` may have been given."""
    if isinstance(settings.get("model_init_kwargs"), dict):
        settings["model_init_kwargs"] = {k: v for k, v in settings["model_init_kwargs"].items() if k != "token"}
    return settings


def require(holds: Any, config: GRPOConfig, name: str, wanted: str) -> None:
    """Raise a ValueError that names the field, its value and what to set, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r} is not valid; set it to {wanted}.")
