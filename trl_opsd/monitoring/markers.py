# SPDX-License-Identifier: Apache-2.0
"""Reflection markers: the words that self-distillation with a reference is said to flood or to drain."""

import re
from collections.abc import Sequence
from functools import lru_cache

REFLECTION_MARKERS = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "likely", "check")


@lru_cache(maxsize=32)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, markers))})(?!\w)", re.IGNORECASE)


def find_markers(text: str, markers: Sequence[str] = REFLECTION_MARKERS) -> list[tuple[int, int]]:
    """Character spans of whole-word, case-blind occurrences of `markers` in `text`."""
    return [match.span() for match in _pattern(tuple(markers)).finditer(text)] if markers else []


def count_markers(text: str, markers: Sequence[str] = REFLECTION_MARKERS) -> int:
    """Number of whole-word, case-blind occurrences of `markers` in `text`."""
    return len(find_markers(text, markers))
