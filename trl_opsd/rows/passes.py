# SPDX-License-Identifier: Apache-2.0
"""A pass over all rows of a dataset: in batches, on one process, and remembered in the dataset's own cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.fingerprint import Hasher

Check = Callable[[Sequence[dict[str, Any]], int], Any]

BATCH_ROWS = 1000
_ROWS_TO_CACHE = 10_000  # fewer are checked again in less time than a cache file takes


def check_all_rows(dataset: Any, check: Check, key: Callable[[], str], name: str) -> None:
    """Call `check` on all rows, a batch at a time; where the dataset is a file, a second run with the same `key` does not.

    Args:
        dataset: rows with a length; a `datasets.Dataset` is read in batches.
        check: takes rows and the index of the first, and raises on a row that is wrong.
        key: gives all that the check depends on beside the rows, as text.
        name: of the dataset, for the progress bar.
    """
    if isinstance(dataset, Dataset) and dataset.cache_files and len(dataset) >= _ROWS_TO_CACHE:
        try:
            _check_once(dataset, check, key, name)
            return
        except OSError:  # nowhere to write the cache: without it, then
            pass
    for start, rows in _batches(dataset):
        check(rows, start)


def _check_once(dataset: Dataset, check: Check, key: Callable[[], str], name: str) -> None:
    def check_batch(columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        check(_as_rows(columns), indices[0])
        return {"checked": [True] * len(indices)}

    dataset.map(
        check_batch,
        batched=True,
        batch_size=BATCH_ROWS,
        with_indices=True,
        remove_columns=dataset.column_names,
        new_fingerprint=Hasher.hash((dataset._fingerprint, key())),
        load_from_cache_file=True,
        desc=f"Checking {name}",
    )


def _batches(dataset: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Index of the first row and rows of each batch."""
    start = 0
    if isinstance(dataset, Dataset):
        for columns in dataset.iter(BATCH_ROWS):
            rows = _as_rows(columns)
            yield start, rows
            start += len(rows)
        return
    iterator = iter(dataset)
    while rows := list(islice(iterator, BATCH_ROWS)):
        yield start, rows
        start += len(rows)


def _as_rows(columns: dict[str, list]) -> list[dict[str, Any]]:
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)]


def check_datasets(check: Callable[[Any, str], Any], train_dataset: Any, eval_dataset: Any) -> None:
    """Call `check` with each dataset and its name, on the main process; what it raises is raised on all. A collective.

    Args:
        check: takes a dataset and the trainer's argument it was given as.
        train_dataset: the one to train on.
        eval_dataset: one, a dict of them, or None.

    Raises:
        ValueError: on the other processes, with the text of whatever the main one raised.
    """
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, Mapping):
        named |= {f"eval_dataset[{key!r}]": part for key, part in eval_dataset.items()}
    elif eval_dataset is not None:
        named["eval_dataset"] = eval_dataset
    error: Exception | None = None
    if PartialState().is_main_process:
        try:
            for name, dataset in named.items():
                check(dataset, name)
        except Exception as raised:  # told to the processes that wait below
            error = raised
    told = [None if error is None else str(error) or repr(error)]
    broadcast_object_list(told)
    if error is not None:
        raise error
    if told[0] is not None:
        raise ValueError(told[0])
