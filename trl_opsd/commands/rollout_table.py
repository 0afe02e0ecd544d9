# SPDX-License-Identifier: Apache-2.0
"""A few rollouts of the completions table for a terminal of any width, two lines each: question, and end of the answer."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ..trainers.rollout_text import read_turns, shown_text

_NUMBERS = "{:>8}  {:>10}  "
_CUT = "..."


def rollout_table(rows: Sequence[Mapping[str, Any]], rewards: Sequence[float | None], width: int) -> str:
    """Reward, divergence, question and answer of rollouts.

    Args:
        rows: rows of the completions table.
        rewards: of each row; None where nothing judged it.
        width: columns of the terminal.

    Returns:
        The text, whose lines end before `width` columns where that is at least 40.
    """
    lines = [_NUMBERS.format("reward", "divergence") + "question, and end of the answer"]
    room = max(width - 1 - len(lines[0].split("question")[0]), 16)
    for row, reward in zip(rows, rewards, strict=True):
        question, answer = (_one_line(row[name]) for name in ("prompt", "completion"))
        numbers = _NUMBERS.format(_number(reward), _number(row.get("divergence")))
        lines += [numbers + cut(question, room), " " * len(numbers) + cut(answer, room, keeps_end=True)]
    return "\n".join(lines)


def cut(text: str, room: int, *, keeps_end: bool = False) -> str:
    """A text in at most `room` columns of a terminal, in which letters of some scripts take two."""
    if _columns(text) <= room:
        return text
    letters, kept, left = text[::-1] if keeps_end else text, "", room - len(_CUT)
    for letter in letters:
        left -= _columns(letter)
        if left < 0:
            break
        kept += letter
    return _CUT + kept[::-1] if keeps_end else kept + _CUT


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _one_line(turns: Any) -> str:
    return shown_text(" ".join(read_turns(turns).split()))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"
