# SPDX-License-Identifier: Apache-2.0
"""What is checked of the dataset's rows before any training, each with an error that names the fix."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from .passes import check_all_rows
from .texts import OWN_PROMPT, check_prompt, check_text, is_missing, joined_parts, own_prompt

# What the cache of checked rows is told apart by: one more wherever a check of rows changes.
CHECKS_VERSION = 3
IMAGE_COLUMNS = ("image", "images")
# Keyword arguments that TRL's trainer passes to every reward function beside the dataset's columns.
TRL_COLUMNS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric", "environments")


def check_dataset(dataset: Any, name: str, *, needs_solution: bool) -> None:
    """Check columns and rows of a training or evaluation dataset.

    Every row of a map-style dataset is read; of a streamed one the first, the others are checked as they are used.

    Args:
        dataset: a `datasets.Dataset`, `IterableDataset`, or a dict of them for evaluation.
        name: the trainer argument it was given as, for the message.
        needs_solution: the method's teacher reads the reference solution of every row that brings no prompt of its own.

    Raises:
        ValueError: it is no dataset or empty, lacks a column, has images, or a row is malformed.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]", needs_solution=needs_solution)
        return
    if not hasattr(dataset, "column_names"):
        raise ValueError(f"{name} is a {type(dataset).__name__}; make a dataset of it with `Dataset.from_list`.")
    if next(iter(dataset), None) is None:
        raise ValueError(f"{name} is empty. Give it at least one row with `prompt` and `solution`.")
    columns = dataset.column_names
    if columns is not None:
        _check_columns(columns, name, needs_solution)
        dataset = dataset.select_columns([column for column in ("prompt", "solution", OWN_PROMPT) if column in columns])
    if not hasattr(dataset, "__len__"):
        check_rows(islice(dataset, 1), name, needs_solution=needs_solution)
        return
    check_all_rows(
        dataset,
        lambda rows, start: check_rows(rows, name, needs_solution=needs_solution, start=start),
        key=lambda: f"rows {needs_solution} {CHECKS_VERSION}",
        name=name,
    )


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    *,
    needs_solution: bool,
    special_tokens: Sequence[str] = (),
    start: int = 0,
) -> None:
    """Check rows one by one; the message names the row's index and the field.

    Args:
        rows: of a dataset or a generation batch.
        name: of the dataset, for the message.
        needs_solution: see `check_dataset`.
        special_tokens: control tokens that no text may spell out, see `check_no_special_token`.
        start: index of the first of `rows`, for the message.

    Raises:
        ValueError: a prompt that the teacher could not be shown, a missing, blank or unreadable solution, an image, a
            column name that TRL takes, or a row unlike the first.
    """
    first = None
    for index, row in enumerate(rows, start):
        place = f"{name} row {index}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{place} is {type(row).__name__}. Give a dict with `prompt` and `solution`.")
        check_prompt(row.get("prompt"), place)
        _check_solution(row.get("solution"), place, needs_solution and own_prompt(row) is None)
        _check_other_columns(row, place)
        first = row if first is None else first
        _check_alike(row, first, place)
        check_no_special_token(row, place, special_tokens)


def check_no_special_token(
    row: Mapping[str, Any], place: str, special_tokens: Sequence[str], columns: Sequence[str] = ()
) -> None:
    """Check that no text of a row spells out a control token such as `<|im_end|>`: prompt, solution, and further `columns`.

    A tokenizer turns it into the token itself: it would end the user's turn within the text, and the rest would be read
    as another speaker's.

    Raises:
        ValueError: names the row, the field and the token.
    """
    if not special_tokens:
        return
    tokens = tuple(special_tokens)
    starts, pattern = _starts_of(tokens), _any_of(tokens)
    prompt = row["prompt"]
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    texts = [("prompt", joined_parts(message).get("content")) for message in messages]
    for name in ("solution", *columns):
        value = row.get(name)
        parts = value if isinstance(value, list) else [value]
        texts += [(name, joined_parts(part).get("content") if isinstance(part, dict) else part) for part in parts]
    for field, text in texts:
        if not isinstance(text, str) or not any(start in text for start in starts):
            continue
        if (found := pattern.search(text)) is not None:
            raise ValueError(
                f"{place}: `{field}` spells out {found.group()!r}, a control token of the tokenizer, which would end or "
                "open a turn within the text. Take it out of the text, or remove the row; give turns as messages."
            )


def without_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    """`text` without spelled out control tokens, those that removing one brings together too.

    After each removal only the seam is read again: a text of tokens within tokens takes linear time.
    """
    if not special_tokens:
        return text
    pattern, reach = _any_of(tuple(special_tokens)), max(map(len, special_tokens))
    kept: list[str] = []  # characters
    position = 0
    while found := pattern.search(text, position):
        kept += text[position : found.start()]
        position = found.end()
        before = "".join(kept[-reach:])
        while (found := pattern.search(before + text[position : position + reach])) and found.start() < len(before):
            position += found.end() - len(before)
            del kept[len(kept) - len(before) + found.start() :]
            before = "".join(kept[-reach:])
    return "".join(kept) + text[position:]


@lru_cache(maxsize=32)
def _starts_of(tokens: tuple[str, ...]) -> frozenset[str]:
    """First two characters of the tokens: looking for these takes a twentieth of the time of the whole pattern."""
    return frozenset(token[:2] for token in tokens)


@lru_cache(maxsize=32)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _check_solution(solution: Any, place: str, needs_solution: bool) -> None:
    if not needs_solution and is_missing(solution):
        return
    if not isinstance(solution, str) or not solution.strip():
        raise ValueError(
            f"{place}: `solution` is {_describe(solution)}, but the teacher reads it. Remove the row or give it a "
            "reference solution as text."
        )
    check_text(solution, f"{place}: `solution`")


def _check_other_columns(row: Mapping[str, Any], place: str) -> None:
    for column in row:
        if not isinstance(column, str):
            raise ValueError(f"{place} has the column name {column!r} ({type(column).__name__}). Give columns names.")
        if column in IMAGE_COLUMNS and row[column] is not None:
            raise ValueError(f"{place}: `{column}`: images are not carried into the teacher's prompt. Remove it.")
        if column in TRL_COLUMNS:
            raise ValueError(f"{place}: `{column}` is a name that TRL gives to reward functions itself. Rename it.")


def _check_alike(row: Mapping[str, Any], first: Mapping[str, Any], place: str) -> None:
    """TRL decides by the first row of a batch what columns there are and whether prompts are conversations."""
    if row.keys() != first.keys():
        other = sorted(row.keys() ^ first.keys())
        raise ValueError(f"{place}: the columns {other} are in this row or in row 0 but not in both. Give all or none.")
    if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
        raise ValueError(
            f"{place}: `prompt` is {'text' if isinstance(row['prompt'], str) else 'a conversation'}, unlike row 0's. Give "
            "every prompt in one form."
        )


def _check_columns(columns: list[str], name: str, needs_solution: bool) -> None:
    for column in ("prompt", "solution") if needs_solution and OWN_PROMPT not in columns else ("prompt",):
        if column not in columns:
            raise ValueError(
                f"{name} has no `{column}` column (it has {columns}). Copy the column that holds the "
                f"{'problem' if column == 'prompt' else 'reference solution'}: "
                f"`dataset.map(lambda row: {{{column!r}: row[...]}})`; reward functions can then still read the old one."
            )
    _check_other_columns(dict.fromkeys(columns), name)
    images = [column for column in IMAGE_COLUMNS if column in columns]
    if images:
        raise ValueError(
            f"{name} has the column `{images[0]}`: images are not carried into the teacher's prompt. Remove the column "
            "to train on text alone."
        )


def _describe(value: Any) -> str:
    return "empty" if isinstance(value, str) else "None" if value is None else f"of type {type(value).__name__}"
