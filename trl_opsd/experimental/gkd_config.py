# SPDX-License-Identifier: Apache-2.0
"""Settings of OPSD for scripts of TRL's experimental GKDTrainer, and what of GKD has no meaning here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._trl.versions import dict_fields, gkd_classes
from ..rows.texts import slots_of
from ..settings.fields import check_settings, option
from ..settings.shared import SelfDistillationSettings

GKDConfig, GKDTrainer = gkd_classes()

# Settings and arguments of GKD that have no meaning here -> what to set instead.
_OTHER_SETTINGS = {
    "beta": "divergence ('forward_kl' is their 0, 'reverse_kl' their 1, 'jsd' with mixture_weight what is between)",
    "seq_kd": "lmbda, and put the text to train on into `messages`",
    "teacher_model_name_or_path": "teacher_model_kind: the model itself is the teacher",
    "teacher_model_init_kwargs": "model_init_kwargs: the model itself is the teacher",
}
_OTHER_ARGUMENTS = {
    "teacher_model": "the model itself is the teacher; for another one use TRL's GKDTrainer",
    "data_collator": "batches carry each row's question and solution; set prompt_template or max_length",
    "compute_metrics": "there are no logits to give it",
    "preprocess_logits_for_metrics": "there are no logits to give it",
    "formatting_func": "give `messages` and `solution`",
}


@dataclass
class OPSDGKDConfig(SelfDistillationSettings, GKDConfig):
    """Settings of `OPSDGKDTrainer`: every field of `trl.experimental.gkd.GKDConfig`, and those of teacher and loss.

    The defaults are OPSD's (arXiv 2601.18734, version 3), so `lmbda` is 1; top-p 1 and no top-k are GKDTrainer's own.
    A mean over tokens is over a micro-batch of all ranks, and the optimizer step takes the mean of those.

    Raises:
        ValueError: a field outside its range, or one of GKD that has another name here.
    """

    _rollout_limit = "max_new_tokens"
    _VALID_DICT_FIELDS = dict_fields(GKDConfig)

    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    max_grad_norm: float = option(0.1, "Largest gradient norm; larger ones are scaled down.")
    max_steps: int = option(100, "Optimizer steps. The papers stop early: long runs collapse.")
    save_steps: float = option(25, "Steps between checkpoints.")
    per_device_train_batch_size: int = option(4, "Rollouts per device and micro-batch.")
    gradient_accumulation_steps: int = option(8, "Micro-batches per optimizer step.")
    max_new_tokens: int = option(1024, "Longest rollout in tokens.")
    max_length: int | None = option(
        None, "Tokens of prompt and answer of a row that is not sampled; the answer loses its end. None for all."
    )
    lmbda: float = option(
        1.0, "Chance, in [0, 1], that a micro-batch is sampled; otherwise its `messages` are trained on as they are."
    )
    loss_reduction: str = option(
        "token",
        "`token`: mean over all tokens of a micro-batch, over ranks; `sequence`: mean of each rollout's mean. An "
        "optimizer step takes the mean of its micro-batches.",
    )

    def __post_init__(self):
        self.read_texts()
        super().__post_init__()
        defaults = GKDConfig.__dataclass_fields__
        for name, instead in _OTHER_SETTINGS.items():
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} is not read by OPSDGKDTrainer. Set {instead}.")
        check_settings(self)
        if self.teacher_prompt_function is not None:
            raise ValueError(
                f"teacher_prompt_template={self.teacher_prompt_template!r}: OPSDGKDTrainer fills a template and calls no function. "
                "Give a template, or train with OPSDTrainer."
            )
        columns = [slot for slot in slots_of(self.teacher_prompt_template) if slot not in ("prompt", "solution")]
        if columns:
            raise ValueError(
                f"teacher_prompt_template: OPSDGKDTrainer fills {{prompt}} and {{solution}}, not {{{columns[0]}}}. Take the slot "
                "out, or train with OPSDTrainer, which reads further columns."
            )


class NoTeacher(torch.nn.Linear):
    """In place of the second model that GKDTrainer wants: the vocabulary it compares, and one weight for DeepSpeed."""

    def __init__(self, config: Any):
        super().__init__(1, 1, bias=False)
        self.config = config


def refuse_arguments(owner: str, others: Mapping[str, Any]) -> None:
    """Refuse GKDTrainer's arguments that have no meaning here, by name.

    Args:
        owner: the trainer's name.
        others: arguments that it does not take, by name; None is as if it were not given.

    Raises:
        TypeError: GKDTrainer does not have it either.
        ValueError: it is given; says what to do instead.
    """
    for name, value in others.items():
        if name not in _OTHER_ARGUMENTS:
            raise TypeError(f"{owner} has no argument {name!r}.")
        if value is not None:
            raise ValueError(f"{name} is given to {owner}: {_OTHER_ARGUMENTS[name]}. Leave it out.")


def refuse_fsdp(args: OPSDGKDConfig) -> None:
    """Refuse FSDP, on which the parent was never run."""
    if getattr(args, "fsdp_plugin", None) is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "FSDP is not supported by OPSDGKDTrainer: its parent was never run there. Launch with DDP, ZeRO-2 or ZeRO-3, "
            "or use OPSDTrainer, which trains under FSDP2 too."
        )
