# SPDX-License-Identifier: Apache-2.0
"""TRL's own trainers on the same rows, for a comparison at the same budget: SFT on the solutions, GRPO on the answers.

The student reads the same prompt as in the methods, with the same settings. SFT is given token ids for that: TRL renders
prompt and answer together, and a template may then leave out what it puts in front of an answer that is sampled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from .._trl.versions import dict_fields, trusts_remote_code
from ..evaluation.sampling import render_prompt
from ..rewards import make_accuracy_reward
from ..rows.checks import check_dataset
from ..rows.formats import rewrite_prompt
from ..rows.texts import as_text_turns
from ..settings.fields import check_settings
from ..settings.shared import AnswerSettings, StudentPrompt

_ANSWER = "ANSWER"


@dataclass
class SFTBaselineConfig(StudentPrompt, SFTConfig):
    """TRL's SFTConfig and the prompt that the methods train with."""

    _VALID_DICT_FIELDS = dict_fields(SFTConfig, "chat_template_kwargs")

    def __post_init__(self):
        super().__post_init__()
        if self.completion_only_loss is None:
            self.completion_only_loss = True  # TRL's choice for prompts and completions, whose ids it is given here
        check_settings(self)


@dataclass
class GRPOBaselineConfig(StudentPrompt, AnswerSettings, GRPOConfig):
    """TRL's GRPOConfig and the prompt that the methods train with."""

    _VALID_DICT_FIELDS = dict_fields(GRPOConfig, "chat_template_kwargs")

    def __post_init__(self):
        super().__post_init__()
        check_settings(self)


BASELINES = {"sft": (SFTTrainer, SFTBaselineConfig), "grpo": (GRPOTrainer, GRPOBaselineConfig)}


def baseline_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a method's trainer as a baseline's trainer takes them.

    Args:
        name: of `BASELINES`.
        arguments: model by name, config and datasets with `prompt` and `solution` among them.

    Raises:
        ValueError: a dataset is not as the methods take it.
    """
    arguments, args = dict(arguments), arguments["args"]
    to_row = partial(rewrite_prompt, template=args.prompt_template or "{prompt}")
    if name == "sft":
        init = args.model_init_kwargs
        tokenizer = AutoTokenizer.from_pretrained(
            arguments["model"], revision=init.get("revision"), trust_remote_code=trusts_remote_code(args)
        )
        to_row = partial(sft_row, tokenizer=tokenizer, args=args)
    for split in ("train_dataset", "eval_dataset"):
        rows = arguments[split]
        if rows is not None:
            check_dataset(rows, split, needs_solution=True)
            arguments[split] = rows.map(to_row, remove_columns=rows.column_names if name == "sft" else None)
    return arguments | ({"reward_funcs": make_accuracy_reward(args.verifier)} if name == "grpo" else {})


def sft_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SFTBaselineConfig) -> dict[str, Any]:
    """Token ids of a prompt as it is sampled from, and of the solution as the model is to say it."""
    prompt = row["prompt"]
    if args.prompt_template is not None:
        prompt = rewrite_prompt(row, args.prompt_template)["prompt"]
    prompt = as_text_turns(prompt)
    kwargs = args.chat_template_kwargs or {}
    asked = render_prompt(tokenizer, prompt, kwargs)
    told = [*tokenizer(row["solution"], add_special_tokens=False)["input_ids"]]
    told += [tokenizer.eos_token_id] if isinstance(prompt, str) else end_of_turn(tokenizer, kwargs)
    return {"input_ids": asked + told, "completion_mask": [0] * len(asked) + [1] * len(told)}


def end_of_turn(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
    """What a chat template writes behind an answer, up to the token that ends sampling."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, **chat_template_kwargs)
    ids = list(tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]
