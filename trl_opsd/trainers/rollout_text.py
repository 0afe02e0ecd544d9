# SPDX-License-Identifier: Apache-2.0
"""Rollouts of a batch as text for a terminal of any width; TRL's table gives each of its columns as little as it has."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a model says to a terminal is shown, not done


def rollouts_text(rows: Sequence[Mapping[str, Any]], step: int, most: int | None) -> str:
    """Prompt, completion and numbers of some rollouts.

    Args:
        rows: rows of the completions table.
        step: optimizer step.
        most: rollouts shown, spread over the batch; None for all.

    Returns:
        The text; empty where nothing is to be shown.
    """
    shown = spread(len(rows), most)
    parts = [
        f"--- rollout {index + 1} of {len(rows)}, step {step} ---\n{_row_text(rows[index])}\n\n" for index in shown
    ]
    return shown_text("".join(parts))


def spread(number: int, most: int | None) -> list[int]:
    """Indices of at most `most` of `number` rows, spread over them; None for all."""
    count = number if most is None else max(0, min(most, number))
    return [index * number // count for index in range(count)]


def shown_text(text: str) -> str:
    """A text whose control characters are shown and command no terminal; tabs and ends of lines stay."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def _row_text(row: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    texts = [f"{name}: {read_turns(row[name]).strip()}" for name in ("prompt", "completion")]
    return "\n".join([*texts, ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())])


def read_turns(turns: str | list[dict[str, Any]]) -> str:
    """Text, or what a conversation's turns say, each behind its role where there are several."""
    if isinstance(turns, str):
        return turns
    texts = [_said(turn) for turn in turns]
    if len(texts) == 1:
        return texts[0]
    names = [" ".join(filter(None, (turn.get("role"), turn.get("name")))) for turn in turns]
    return "\n".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))


def _said(turn: Mapping[str, Any]) -> str:
    """What a turn says, and the tools that it calls."""
    calls = turn.get("tool_calls") or ()
    calls = json.loads(calls) if isinstance(calls, str) else calls  # as they stand in a table that is being written
    calls = [call.get("function", call) for call in calls]
    told = [f"[calls {call.get('name')} with {call.get('arguments')}]" for call in calls]
    return "\n".join(map(str, filter(None, [turn.get("content"), *told])))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
