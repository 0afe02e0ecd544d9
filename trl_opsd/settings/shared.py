# SPDX-License-Identifier: Apache-2.0
"""Settings that every config of this package shares, whichever of TRL's configs it extends: teacher, prompts and loss."""

import json
import re
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..rows.texts import check_template
from ..teacher.contexts import TEACHER_KINDS, TEACHER_PROMPT_TEMPLATE
from ..user_functions import load_function
from .fields import option, require, teacher_kind
from .horizon import Horizon, read_length

if TYPE_CHECKING:
    from ..losses import Divergence

_FUNCTION = re.compile(r"[\w.]+:\w+")


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
    """The teacher, its prompt and the loss; a mixin in front of one of TRL's configs.

    Raises:
        ValueError: a field outside its range; the message names the field, its value and what to set instead.
    """

    _rollout_limit = "max_completion_length"  # the field that TRL's config limits a rollout with
    # Optimizer steps between two updates of the `ema` teacher; a field of `MovingTeacherSettings`.
    teacher_sync_steps = 1

    # Not in `repr`, unlike in TRL's own configs.
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token to push with; best left unset, then the one of `hf auth login` or HF_TOKEN is used."},
    )

    # The teacher.
    teacher_model_kind: str = teacher_kind("base")
    teacher_update_rate: float = option(0.001, "Share of the student in each update of the `ema` teacher, in (0, 1].")
    teacher_prompt_template: str = option(
        TEACHER_PROMPT_TEMPLATE,
        "The teacher's last user message; holds `{solution}` and, for a privileged teacher, `{prompt}`. Or `module:function` of "
        "yours, called after sampling: from a rollout (see `trl_opsd.Rollout`) to text, to messages, or to None for the row's "
        "column `teacher_prompt`, else for the method's template.",
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
    teacher_tokens_per_forward: int = option(
        32_768, "Tokens, padding and cached ones included, that one teacher forward may hold."
    )

    temperature: float = option(1.1, "Sampling temperature of the rollouts.")

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
    distillation_length: int | str | None = option(
        None,
        "Only the first so many tokens of a rollout are distilled; None for all. `256..1024 in 50` grows from 256 to 1024 over "
        "50 optimizer steps, and sampling then stops there too where nothing trains on rewards.",
    )
    num_loss_tokens_to_skip: int = option(0, "So many first tokens of a rollout are not distilled.")

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
            **self.divergence_limits(),
        )

    def divergence_limits(self) -> dict[str, Any]:
        """What of the vocabulary a method compares: fields `support` and floors of the divergence."""
        return {}

    @property
    def teacher_prompt_function(self) -> str | None:
        """The user's function that `teacher_prompt_template` names: from a rollout to text, messages, or None."""
        named = self.teacher_prompt_template
        return named if isinstance(named, str) and _FUNCTION.fullmatch(named) else None

    @property
    def teacher_template(self) -> str:
        """The template of the rows for which no function writes what the teacher reads: the method's own where there is one."""
        if self.teacher_prompt_function is None:
            return self.teacher_prompt_template
        return type(self).__dataclass_fields__["teacher_prompt_template"].default

    def horizon(self) -> Horizon | None:
        """How the distilled length grows; None where it is the same at every step."""
        length = read_length(self.distillation_length)
        return length if isinstance(length, Horizon) else None

    def distillation_length_at(self, step: int | None) -> int | None:
        """Tokens of a rollout that are distilled after `step` optimizer steps, None for what the run ends with; None for all."""
        horizon, longest = self.horizon(), getattr(self, self._rollout_limit)
        if horizon is None:
            return self.distillation_length
        if longest is not None:
            horizon = horizon._replace(end=min(horizon.end, longest))
        return horizon.end if step is None else horizon.at(step)

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
        self._check_lengths()

    def _check_lengths(self) -> None:
        self.distillation_length = self.distillation_length if self.horizon() else read_length(self.distillation_length)
        horizon, length, longest = self.horizon(), self.distillation_length_at(None), getattr(self, self._rollout_limit)
        if horizon is not None and longest is not None and horizon.start >= longest:
            raise ValueError(
                f"distillation_length={self.distillation_length!r} has nowhere to grow to: {self._rollout_limit}={longest}. "
                "Start lower, or set one number."
            )
        first = length if horizon is None else horizon.start
        for name, limit in (("distillation_length", first), (self._rollout_limit, longest)):
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
                stacklevel=7,
            )

    def _check_teacher(self) -> None:
        require(self.teacher_model_kind in TEACHER_KINDS, self, "teacher_model_kind", f"one of {TEACHER_KINDS}")
        require(0 < self.teacher_update_rate <= 1, self, "teacher_update_rate", "above 0 and at most 1")
        require(self.teacher_tokens_per_forward >= 1, self, "teacher_tokens_per_forward", "1 or more")
        budget = self.max_teacher_prompt_length
        require(budget is None or budget >= 1, self, "max_teacher_prompt_length", "1 or more, or None")
        if self.teacher_prompt_function is not None:
            load_function(self.teacher_prompt_function, "teacher_prompt_template", takes="a rollout")
        check_template("teacher_prompt_template", self.teacher_template, "{prompt}", "{solution}")


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
