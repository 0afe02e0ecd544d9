# SPDX-License-Identifier: Apache-2.0
"""Settings that every config of this package shares, whichever of TRL's configs it extends: teacher, prompts and loss."""

import json
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..rows.texts import check_template
from ..teacher.contexts import REFERENCE_PROMPT_TEMPLATE, SHORTEN_CHOICES, TEACHER_KINDS, TEACHER_PROMPT_TEMPLATE
from .fields import option, require

if TYPE_CHECKING:
    from ..losses import Divergence


@dataclass
class StudentPrompt:
    """The prompt as the student reads it; the methods and the baselines share it, so that their numbers compare."""

    chat_template_kwargs: dict | str | None = option(
        {"enable_thinking": False}, "Keyword arguments of the chat template for the student's prompt."
    )
    prompt_template: str | None = option(
        None,
        "Rewrites the last user message before sampling; holds `{prompt}`. None takes the dataset's prompt as it is.",
    )

    def check(self) -> None:
        """Raise a ValueError for a template without its slot."""
        if self.prompt_template is not None:
            check_template("prompt_template", self.prompt_template, "{prompt}")


@dataclass
class AnswerSettings:
    """How answers are compared, wherever some are rewarded."""

    verifier: str = option(
        "math",
        "How answers are compared: `math` (math-verify), `exact` (as text, leading zeros count), `choice` (letters), or "
        "`module:function`, your own, of completion and solution.",
    )

    def check(self) -> None:
        """Raise a ValueError for a verifier that does not exist."""
        from ..verification import check_verifier

        check_verifier(self.verifier)


@dataclass
class SelfDistillationSettings(StudentPrompt):
    """The teacher, its prompt and the loss; a mixin in front of one of TRL's configs, which has `temperature`.

    Raises:
        ValueError: a field outside its range; the message names the field, its value and what to set instead.
    """

    _rollout_limit = "max_completion_length"  # the field that TRL's config limits a rollout with

    # Not in `repr`, unlike in TRL's own configs.
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token to push with; best left unset, then the one of `hf auth login` or HF_TOKEN is used."},
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

    # The loss.
    divergence: str = option(
        "forward_kl", "What is measured between teacher and student; docs/methods.md lists the names."
    )
    mixture_weight: float = option(
        0.5, "Weight of the teacher in the mixture that `jsd` and the skewed divergences use, in (0, 1)."
    )
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
    compile_loss: bool = option(
        False,
        "Fuse the loss's elementwise work with torch.compile: faster after a minute of compiling; needs Triton on a GPU, "
        "a C++ compiler on a CPU.",
    )
    distillation_length: int | None = option(
        None, "Only the first so many tokens of a rollout are distilled. None for all."
    )
    distillation_length_start: int | None = option(
        None,
        "So many at the first step, then linearly more up to `distillation_length`, or to the longest rollout. None for "
        "the same at every step.",
    )
    distillation_length_steps: int = option(0, "Optimizer steps that `distillation_length_start` takes to grow.")
    num_loss_tokens_to_skip: int = option(0, "So many first tokens of a rollout are not distilled.")

    # Checkpoints.
    checkpoint_hashes: bool = option(
        True,
        "List the SHA-256 of a checkpoint's files and of the initial weights, and compare them when a run is resumed: each "
        "reads everything once. Off for very large models; sizes are always compared.",
    )
    overwrite_output_dir: bool = option(
        False,
        "Start from the beginning in a folder that holds another run's checkpoints, which is refused otherwise. Each stays "
        "until a step of its number is saved.",
    )

    def read_texts(self) -> None:
        """Settle what the command line writes as text; before the checks of TRL's config."""
        for name in ("chat_template_kwargs", "teacher_chat_template_kwargs"):
            require(_is_json_object(getattr(self, name)), self, name, "a JSON object or None")
        if isinstance(self.clip, str) and self.clip.lower() == "none":
            self.clip = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings without tokens: HF Trainer pickles them into `training_args.bin`, which a push uploads."""
        return _without_model_token({**self.__dict__, "hub_token": None})

    def to_dict(self) -> dict[str, Any]:
        """The settings as trackers get them, without tokens."""
        return _without_model_token(super().to_dict())

    def loss_divergence(self) -> "Divergence":
        """The divergence of the loss with its temperature and clip.

        Raises:
            ValueError: one of its fields is outside its range.
        """
        from ..losses import Divergence

        return Divergence(
            name=self.divergence,
            mixture_weight=self.mixture_weight,
            temperature=self.loss_temperature,
            clip=self.clip,
            clip_value=self.clip_value,
        )

    def distillation_length_at(self, step: int) -> int | None:
        """Tokens of a rollout that are distilled after `step` optimizer steps; None for all."""
        start, end = self.distillation_length_start, self.distillation_length
        if start is None:
            return end
        longest = getattr(self, self._rollout_limit)
        end = longest if end is None else min(end, longest or end)
        return round(start + (end - start) * min(1.0, step / self.distillation_length_steps))

    def check(self) -> None:
        """Raise a ValueError for a setting of the teacher or the loss outside its range."""
        self._check_loss()
        self._check_teacher()

    def _check_loss(self) -> None:
        if self.loss_temperature is None:
            self.loss_temperature = self.temperature
        require(self.temperature > 0, self, "temperature", "a number above 0")
        require(self.loss_temperature > 0, self, "loss_temperature", "a number above 0, or None")
        self.loss_divergence()
        require(self.loss_reduction in ("token", "sequence"), self, "loss_reduction", "'token' or 'sequence'")
        require(self.num_loss_tokens_to_skip >= 0, self, "num_loss_tokens_to_skip", "0 or more")
        length, longest = self.distillation_length, getattr(self, self._rollout_limit)
        require(length is None or length > 0, self, "distillation_length", "a positive number of tokens, or None")
        self._check_growth()
        for name in ("distillation_length_start", "distillation_length", self._rollout_limit):
            limit = getattr(self, name)
            if limit is not None and self.num_loss_tokens_to_skip >= limit:
                raise ValueError(
                    f"num_loss_tokens_to_skip={self.num_loss_tokens_to_skip} leaves nothing of {name}={limit}. Skip "
                    "fewer tokens or distil more."
                )
        chosen = length != type(self).__dataclass_fields__["distillation_length"].default
        if chosen and None not in (length, longest) and length > longest:
            warnings.warn(
                f"distillation_length={length} is above {self._rollout_limit}={longest}; "
                "every token of a rollout is distilled.",
                stacklevel=6,
            )

    def _check_growth(self) -> None:
        start, steps = self.distillation_length_start, self.distillation_length_steps
        require(start is None or start > 0, self, "distillation_length_start", "a positive number of tokens, or None")
        require(steps >= 0, self, "distillation_length_steps", "0 or more")
        if (start is None) != (steps == 0):
            raise ValueError(
                f"distillation_length_start={start} with distillation_length_steps={steps}: set both to have the distilled "
                "length grow, or neither."
            )
        length, longest = self.distillation_length, getattr(self, self._rollout_limit)
        if start is not None and start >= min((end for end in (length, longest) if end is not None), default=0):
            raise ValueError(
                f"distillation_length_start={start} has nowhere to grow to: distillation_length={length}, "
                f"{self._rollout_limit}={longest}. Lower it, or leave it unset."
            )

    def _check_teacher(self) -> None:
        require(self.teacher_model_kind in TEACHER_KINDS, self, "teacher_model_kind", f"one of {TEACHER_KINDS}")
        require(0 < self.teacher_update_rate <= 1, self, "teacher_update_rate", "above 0 and at most 1")
        require(self.teacher_sync_steps >= 1, self, "teacher_sync_steps", "1 or more")
        require(self.solution_shortening in SHORTEN_CHOICES, self, "solution_shortening", f"one of {SHORTEN_CHOICES}")
        require(self.teacher_tokens_per_forward >= 1, self, "teacher_tokens_per_forward", "1 or more")
        budget = self.max_teacher_prompt_length
        require(budget is None or budget >= 1, self, "max_teacher_prompt_length", "1 or more, or None")
        check_template("teacher_prompt_template", self.teacher_prompt_template, "{prompt}", "{solution}")
        check_template("reference_prompt_template", self.reference_prompt_template, "{solution}")


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
