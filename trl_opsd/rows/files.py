# SPDX-License-Identifier: Apache-2.0
"""Rows of local files, and which line of a file cannot be read: `datasets` does not say."""

import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def is_data_file(name: str) -> bool:
    """Whether a dataset's name is that of a file, by its suffix."""
    return Path(name).suffix in _LOADERS


def load_data_file(name: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of a file.

    Args:
        name: of a .json, .jsonl, .parquet or .csv file.
        streaming: read rows as they are used.

    Raises:
        ValueError: there is no such file, it is empty, or it cannot be read; of JSON lines names the line.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"dataset_name={name!r}: no such file.")
    if not path.stat().st_size:
        raise ValueError(f"dataset_name={name!r}: the file is empty. Write one row a line.")
    try:
        rows = load_dataset(_LOADERS[path.suffix], data_files=name, split="train", streaming=streaming)
        if streaming:
            next(iter(rows), None)  # what cannot be read at all shows now
        return rows
    except Exception as error:  # of pyarrow, pandas and datasets, each with classes of its own
        cause = error.__cause__ or error
        found = next(bad_lines(path), None) if path.suffix in (".json", ".jsonl") else None
        why = found or f"{name}: it cannot be read ({' '.join(str(cause).split())})"
        raise ValueError(f"{why}. Mend it, or write the file again.") from error


def bad_lines(path: Path) -> Iterator[str]:
    """Lines of a JSON lines file that are no JSON object."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(map(str.strip, file), 1):
            try:
                is_row = not line or isinstance(json.loads(line), dict)
            except json.JSONDecodeError as error:
                yield f"{path}, line {number}, column {error.colno}: it is no JSON ({error.msg})"
                continue
            if not is_row:
                yield f"{path}, line {number}: it is JSON, but no mapping of columns"
