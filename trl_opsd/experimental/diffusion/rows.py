# SPDX-License-Identifier: Apache-2.0
"""Rows as token ids, and the order in which they are visited: a batch as often as its samples have updates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from ...evaluation.sampling import render_prompt
from ...rows.checks import check_dataset, check_rows
from .settings import DiffusionOPSDSettings


class EncodedRow(NamedTuple):
    """A row of the dataset.

    Attributes:
        index: its place there.
        prompt: token ids up to the answer.
        solution: the reference whose answer is verified.
    """

    index: int
    prompt: list[int]
    solution: str


def encode_rows(dataset: Any, tokenizer: Any, settings: DiffusionOPSDSettings, mask_token_id: int) -> list[EncodedRow]:
    """Check and encode every row.

    Raises:
        ValueError: it is no dataset with a length, or a row lacks a prompt or a solution, spells out a control token, or has a
            prompt that is too long; names the row.
    """
    check_dataset(dataset, "train_dataset", needs_solution=True)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "train_dataset is streamed: its rows are visited several times, in an order of our own. Give a "
            "`datasets.Dataset`, for instance `Dataset.from_list(list(rows))`."
        )
    rows = [{"prompt": row["prompt"], "solution": row["solution"]} for row in dataset]
    tokens = [*tokenizer.all_special_tokens, tokenizer.convert_ids_to_tokens(mask_token_id)]
    check_rows(rows, "train_dataset", needs_solution=True, special_tokens=tokens)
    return [_encode(index, row, tokenizer, settings) for index, row in enumerate(rows)]


def _encode(index: int, row: Mapping[str, Any], tokenizer: Any, settings: DiffusionOPSDSettings) -> EncodedRow:
    prompt = render_prompt(tokenizer, row["prompt"], settings.chat_template_kwargs)
    if len(prompt) > settings.max_prompt_length:
        raise ValueError(
            f"train_dataset row {index}: its prompt has {len(prompt)} tokens, more than max_prompt_length="
            f"{settings.max_prompt_length}. Raise it, or drop prompts this long; none is cut."
        )
    return EncodedRow(index, prompt, row["solution"])


class RepeatedRows(Sampler):
    """Visits shuffled rows in groups, each group `num_visits` times in a row; what fills no group is left out.

    Args:
        num_rows: of the dataset.
        group_size: rows of an optimizer step, over all processes.
        num_visits: updates of a sample.
        seed: of the shuffles, one an epoch.
        step: gives the optimizer step, from which the epoch follows, after a resume too.

    Raises:
        ValueError: there are fewer rows than a step takes.
    """

    def __init__(self, num_rows: int, group_size: int, num_visits: int, seed: int, step: Callable[[], int]):
        self.num_groups = num_rows // group_size
        if self.num_groups == 0:
            raise ValueError(
                f"train_dataset has {num_rows} rows, but an optimizer step takes {group_size} (per_device_train_batch_size x "
                "gradient_accumulation_steps x processes). Give more rows, or lower one of these."
            )
        self.num_rows, self.group_size, self.num_visits, self.seed = num_rows, group_size, num_visits, seed
        self.step = step

    def __iter__(self) -> Iterator[int]:
        epoch = self.step() // (self.num_groups * self.num_visits)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        for start in range(0, self.num_groups * self.group_size, self.group_size):
            for _ in range(self.num_visits):
                yield from order[start : start + self.group_size]

    def __len__(self) -> int:
        return self.num_groups * self.group_size * self.num_visits


def collate(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """A micro-batch, whose rows stay as they are."""
    return {"rows": [row._asdict() for row in rows]}
