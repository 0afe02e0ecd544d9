# SPDX-License-Identifier: Apache-2.0
"""What a trainer refuses before any training, beyond what its config can know."""

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from .._trl import trusts_remote_code
from ..collators import TeacherCollator
from ..methods import Method
from ..rewards import accuracy_reward, no_reward
from ..validation import check_dataset, check_model_config
from ..verification import verifies

_ROWS_TO_VERIFY = 32


def check_inputs(
    method: Method, config_class: type, model: Any, args: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    """Check arguments, datasets and model before anything is loaded.

    Raises:
        ValueError: names the argument and what to give instead.
    """
    if not isinstance(args, config_class):
        raise ValueError(
            f"args is a {type(args).__name__}; {method.name} needs {config_class.__name__}, which takes the "
            "same fields and more."
        )
    if train_dataset is None:
        raise ValueError("train_dataset is None; give a dataset with the columns `prompt` and `solution`.")
    check_dataset(train_dataset, "train_dataset", needs_solution=method.needs_solution)
    if eval_dataset is not None:
        check_dataset(eval_dataset, "eval_dataset", needs_solution=method.needs_solution)
    check_model_config(_load_config(model, args) if isinstance(model, str) else model.config)


def choose_reward(method: Method, reward_funcs: Any, dataset: Any) -> Any:
    """The user's reward functions; else accuracy where solutions hold an answer; else a zero that TRL needs there.

    Raises:
        ValueError: the method needs to know which rollouts are right, and nothing says so.
    """
    if reward_funcs:
        return reward_funcs
    rows = [row for _, row in zip(range(_ROWS_TO_VERIFY), dataset, strict=False)]
    if any(verifies(row["solution"]) for row in rows if row.get("solution")):
        return accuracy_reward
    if method.needs_reward:
        raise ValueError(
            "reward_funcs is not given and no `solution` of the first rows holds an answer to verify, but "
            f"{method.name} needs to know which rollouts are right. Pass a reward function."
        )
    return no_reward


def check_prompts(collator: TeacherCollator, train_dataset: Any, eval_dataset: Any) -> None:
    """Render a row of each dataset with every template, and every row whose problem could exhaust the budget.

    Raises:
        ValueError: the chat template refuses, or the budget leaves nothing of the solution.
    """
    parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *(part for part in parts if part is not None)):
        collator.check_renders(next(iter(dataset))["prompt"])
        for row in _long_rows(collator, dataset):
            for template in collator.templates:
                collator.check_budget(row["prompt"], template)


def _long_rows(collator: TeacherCollator, dataset: Any) -> Iterator[dict]:
    yield next(iter(dataset))
    if collator.max_length is None or not hasattr(dataset, "__len__"):
        return
    # A token is at least one byte, so only a prompt with more bytes than this may fail to fit.
    bytes_that_fit = collator.max_length - collator.template_length()
    for row in dataset.select_columns("prompt"):
        if len(str(row["prompt"]).encode()) > bytes_that_fit:
            yield row


def _load_config(model: str, args: Any) -> Any:
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusts_remote_code(args))
