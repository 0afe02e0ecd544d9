# SPDX-License-Identifier: Apache-2.0
"""One HTML file from inspected rollouts: no network, no framework, every text escaped.

Numbers are whole thousandths in flat lists and texts stand once in a table, so that 20 rollouts of 1,000 tokens stay a
few megabytes.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..rows.texts import Prompt, message_text
from .records import RolloutRecord, ViewRecord

_SMALLEST = -99_999  # thousandths of a nat: what is shown for a probability of 0


class _Strings:
    """Texts by number, each once."""

    def __init__(self):
        self.index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


def write_page(
    path: str | Path, records: Sequence[RolloutRecord], decode: Callable[[int], str], title: str, facts: dict[str, Any]
) -> Path:
    """Write the page of some rollouts.

    Args:
        path: of the file.
        records: what `Inspector` returned.
        decode: text of a token id on its own, for the lists of likeliest tokens.
        title: of the page.
        facts: shown under the title: models, divergence, clip, thinking modes.

    Returns:
        The path.
    """
    payload = page_payload(records, decode, title, facts)
    # Inside a script element only "<" can end it; U+2028 and U+2029 are escaped by ensure_ascii.
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (files(__package__) / "page.html").read_text(encoding="utf-8")
    head, body = template.split("{{payload}}")
    head = head.replace("{{title}}", html.escape(title))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + text + body, encoding="utf-8")
    return path


def page_payload(
    records: Sequence[RolloutRecord], decode: Callable[[int], str], title: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """What the page's script reads."""
    strings = _Strings()
    names: dict[int, int] = {}

    def name_of(token: int) -> int:
        if token not in names:
            names[token] = strings(decode(token))
        return names[token]

    rollouts = [_rollout(record, strings, name_of) for record in records]
    facts = {name: str(value) for name, value in facts.items()}
    return {"title": title, "facts": facts, "rollouts": rollouts, "strings": list(strings.index)}


def _rollout(record: RolloutRecord, strings: _Strings, name_of: Callable[[int], int]) -> dict[str, Any]:
    return {
        "prompt": prompt_text(record.rollout.prompt),
        "solution": record.rollout.solution,
        "written": None if record.rollout.written is None else record.rollout.written.text,
        "reads": [[view.name, view.reads] for view in record.views if view.reads],
        "reward": _reward(record.rollout.reward),
        "numbers": {name: f"{number:.5g}" for name, number in record.numbers.items()},
        "isExtra": record.is_extra,
        "ids": record.ids,
        "texts": [strings(text) for text in record.texts],
        "markers": [index for index, flag in enumerate(record.markers) if flag],
        "strengths": record.strengths,
        "values": {name: _thousandths(numbers) for name, numbers in record.values.items()},
        "views": [_view(view, name_of) for view in record.views],
    }


def _view(view: ViewRecord, name_of: Callable[[int], int]) -> dict[str, Any]:
    return {
        "name": view.name,
        "contexts": view.num_contexts,
        "weight": None if view.weight is None else f"{view.weight:.3g}",
        "logp": _thousandths(view.log_prob),
        "rank": view.rank,
        "entropy": _thousandths(view.entropy),
        "top": [name_of(token) for row in view.top_ids for token in row],
        "topLogp": _thousandths([value for row in view.top_log_probs for value in row]),
    }


def prompt_text(prompt: Prompt) -> str:
    """A prompt for reading: the roles and texts of a conversation, or the text."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)


def _reward(reward: float | None) -> float | str | None:
    """As it is, or its name: JSON, and so the page's script, has no number for NaN, which runs save for "no reward"."""
    return reward if reward is None or math.isfinite(reward) else str(reward)


def _thousandths(numbers: Sequence[float]) -> list[int]:
    return [max(_SMALLEST, round(1000 * min(number, 1e9))) if number > -1e9 else _SMALLEST for number in numbers]
