# SPDX-License-Identifier: Apache-2.0
"""What a trainer refuses before any training, beyond what its config can know."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers import AutoConfig

from .._trl import trusts_remote_code
from ..collators import TeacherCollator
from ..contexts import TeacherContext
from ..methods import Method
from ..rewards import make_accuracy_reward, no_reward
from ..validation import check_dataset, check_model_config, check_no_special_token
from ..verification import warn_of_golds, which_verify

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
    if args.sample_distilled_only and method.needs_reward:
        raise ValueError(
            f"sample_distilled_only=True, but {method.name} has to see which rollouts end right. Leave it out; "
            "distillation_length alone saves the rest."
        )
    if train_dataset is None:
        raise ValueError("train_dataset is None; give a dataset with the columns `prompt` and `solution`.")
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"train_dataset is a dict of {sorted(train_dataset)}; give one of them, for instance its 'train'."
        )
    check_dataset(train_dataset, "train_dataset", needs_solution=method.needs_solution)
    if eval_dataset is not None:
        check_dataset(eval_dataset, "eval_dataset", needs_solution=method.needs_solution)
    check_model_config(config_of(model, args))


def choose_reward(method: Method, reward_funcs: Any, dataset: Any, verifier: str) -> Any:
    """The user's reward functions; else accuracy where solutions hold an answer; else a zero that TRL needs there.

    Raises:
        ValueError: the method needs to know which rollouts are right, and nothing says so.
    """
    if reward_funcs:
        return reward_funcs
    if any(which_verify(first_solutions(dataset), verifier)):
        return make_accuracy_reward(verifier)
    if method.needs_reward:
        raise ValueError(
            "reward_funcs is not given and no `solution` of the first rows holds an answer that "
            f"verifier={verifier!r} can read, but {method.name} needs to know which rollouts are right. Set another verifier, "
            "or pass a reward function."
        )
    return no_reward


def first_solutions(dataset: Any) -> list[str | None]:
    """Solutions of the rows by which a dataset is judged before training."""
    return [row.get("solution") for row in islice(dataset, _ROWS_TO_VERIFY)]


def warn_of_first_golds(dataset: Any, verifier: str) -> str | None:
    """What to know of answers that are no mathematics, where the first rows have some and are verified by default."""
    solutions = first_solutions(dataset)
    return warn_of_golds(solutions, verifier, "train_dataset") if any(which_verify(solutions, verifier)) else None


def check_prompts(collator: TeacherCollator, train_dataset: Any, eval_dataset: Any) -> None:
    """Render a row of each dataset with every template, and every row that could exhaust the budget or the positions.

    Raises:
        ValueError: the chat template refuses, a text spells out a control token, the budget leaves nothing of the
            solution, or the model has too few positions.
    """
    named = (
        {f"eval_dataset[{key!r}]": part for key, part in eval_dataset.items()} if isinstance(eval_dataset, dict) else {}
    )
    named = named or ({} if eval_dataset is None else {"eval_dataset": eval_dataset})
    for name, dataset in {"train_dataset": train_dataset, **named}.items():
        collator.check_renders(next(iter(dataset))["prompt"])
        for index, row in _readable_rows(dataset):
            with named_place(f"{name} row {index}"):
                check_no_special_token(row, f"{name} row {index}", collator.special_tokens)
                _check_positions(collator, row)
        for row in _long_rows(collator, dataset):
            for template in collator.templates:
                collator.check_budget(row["prompt"], template)


@contextmanager
def named_place(place: str) -> Iterator[None]:
    """Within the context, a ValueError that does not name `place` gets it in front."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place}: {error}") from error


def _readable_rows(dataset: Any) -> Iterator[tuple[int, dict]]:
    """Prompts and solutions of a dataset that can be read before training; of a stream the first row."""
    columns = [column for column in ("prompt", "solution") if column in (dataset.column_names or ())]
    rows = dataset.select_columns(columns) if columns else dataset
    return enumerate(rows if hasattr(dataset, "__len__") else islice(rows, 1))


def _check_positions(collator: TeacherCollator, row: dict) -> None:
    """Encode what is long enough to exceed the model's positions: a token is at least one byte."""
    limit, solution = collator.max_positions, row.get("solution") or ""
    if limit is None or len(f"{row['prompt']}{solution}".encode()) <= limit - collator.template_length():
        return
    collator.check_renders(row["prompt"])
    if solution:
        collator.encode(row["prompt"], TeacherContext("teacher", solution))


def _long_rows(collator: TeacherCollator, dataset: Any) -> Iterator[dict]:
    yield next(iter(dataset))
    if collator.max_length is None or not hasattr(dataset, "__len__"):
        return
    # A token is at least one byte, so only a prompt with more bytes than this may fail to fit.
    bytes_that_fit = collator.max_length - collator.template_length()
    for row in dataset.select_columns("prompt"):
        if len(str(row["prompt"]).encode()) > bytes_that_fit:
            yield row


def config_of(model: Any, args: Any) -> Any:
    """The config of a model, or of the one that a name or folder stands for."""
    if not isinstance(model, str):
        return model.config
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusts_remote_code(args))


def check_sampling_keeps_weights(model: torch.nn.Module, args: Any) -> None:
    """Check that sampling leaves the trained weights as they are: TRL's continuous batching casts the model for good.

    Raises:
        ValueError: the weights that train would lose their float32.
    """
    names = ("use_transformers_continuous_batching", "use_transformers_paged")  # the older name
    used = [name for name in names if getattr(args, name, False)]
    narrow = [name for name in ("bf16", "fp16") if getattr(args, name)]
    if used and narrow and any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters()):
        raise ValueError(
            f"{used[0]}=True with {narrow[0]}=True: at the first sampling TRL casts the whole model, and the float32 weights "
            "that train would lose most updates to rounding from then on. Sample with vLLM or leave it out; or set "
            f"{narrow[0]}=False."
        )


def check_same_weights(model: torch.nn.Module, accelerator: Any) -> None:
    """Under FSDP2, check that every rank was given the same trainable weights; a collective.

    FSDP2 shards each rank's own values without a broadcast, so different ones would become a mixture of models.

    Raises:
        ValueError: they differ.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.cpu_ram_efficient_loading:  # which sends rank 0's to all
        return
    sums = [parameter.detach().double().sum() for parameter in model.parameters() if parameter.requires_grad]
    total = torch.stack([value.to(accelerator.device) for value in sums]).sum()
    if len(set(accelerator.gather(total[None]).tolist())) > 1:
        raise ValueError(
            "model: ranks hold different weights, which FSDP2 would shard into a mixture. Give the model by name, seed "
            "before making it, or set fsdp_cpu_ram_efficient_loading: true."
        )
