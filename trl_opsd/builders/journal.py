# SPDX-License-Identifier: Apache-2.0
"""What a build has done so far: a header with its settings, then a line for each row of the input, failures too.

The output is written from it at the end, so a file that exists is whole, and what becomes of failures can be chosen again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError

SUFFIX = ".journal"


class Journal:
    """The lines of a build, appended a batch at a time; a line that a killed build cut off is dropped.

    Attributes:
        entries: of the rows that are done, in the order of the input.
    """

    def __init__(self, output: str | Path, settings: Mapping[str, Any]):
        """Open the journal beside `output`, or begin it.

        Args:
            output: the JSONL file that the build is to write.
            settings: whatever changes what is written, ready for JSON.

        Raises:
            UsageError: the journal there is of other settings, or no journal; names them.
        """
        self.path = Path(f"{output}{SUFFIX}")
        self.entries: list[dict[str, Any]] = []
        header = {"settings": json.loads(json.dumps(settings))}
        if not self._read(header):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(_line(header), encoding="utf-8")

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, at once."""
        new = [dict(entry) for entry in entries]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, new)))
        self.entries += new

    def _read(self, header: Mapping[str, Any]) -> bool:
        """Take in what stands in the file, its last line only if it is whole; False where nothing does."""
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            return False
        try:
            found, *self.entries = map(json.loads, whole.decode().splitlines())
            self._check(found["settings"], header["settings"])
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path}: it is no journal of a build. Choose another --output.") from error
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return True

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise UsageError(
                f"{self.path} was begun with other settings: {'; '.join(changed)}. Choose another --output, or remove it to begin again."
            )


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file that is whole or not there."""
    unfinished = Path(f"{path}.part")
    unfinished.write_text("".join(map(_line, rows)), encoding="utf-8")
    unfinished.replace(path)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True) + "\n"  # no separator of lines that is not our own
