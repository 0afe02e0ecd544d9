# SPDX-License-Identifier: Apache-2.0
"""Reflection markers: the words that self-distillation with a reference is said to flood or to drain."""

import re
from collections.abc import Sequence
from functools import lru_cache

# Which words "Why Does Self-Distillation (Sometimes) Degrade the Reasoning Capability of LLMs?" (arXiv 2603.24472) counts, as substrings.
EPISTEMIC_MARKERS = (
    "wait",
    "hmm",
    "perhaps",
    "maybe",
    "actually",
    "alternatively",
    "seems",
    "might",
    "likely",
    "check",
)
REFLECTION_MARKERS = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "likely", "check")


@lru_cache(maxsize=32)
def _pattern(markers: tuple[str, ...], whole_words: bool) -> re.Pattern[str]:
    before, behind = (r"(?<!\w)", r"(?!\w)") if whole_words else ("", "")
    return re.compile(rf"{before}(?:{'|'.join(map(re.escape, markers))}){behind}", re.IGNORECASE)


def find_markers(
    text: str, markers: Sequence[str] = REFLECTION_MARKERS, *, whole_words: bool = True
) -> list[tuple[int, int]]:
    """Character spans of case-blind occurrences of `markers` in `text`, within longer words only where `whole_words` is False."""
    return [match.span() for match in _pattern(tuple(markers), whole_words).finditer(text)] if markers else []


def count_markers(text: str, markers: Sequence[str] = REFLECTION_MARKERS, *, whole_words: bool = True) -> int:
    """Number of occurrences that `find_markers` finds."""
    return len(find_markers(text, markers, whole_words=whole_words))
