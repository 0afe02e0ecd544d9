# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a rollout are part of a reflection marker."""

from collections.abc import Sequence
from itertools import accumulate

from ..monitoring.markers import REFLECTION_MARKERS, find_markers


def marker_flags(texts: Sequence[str], markers: Sequence[str] = REFLECTION_MARKERS) -> list[bool]:
    """Whether each token holds a character of a reflection marker."""
    whole = "".join(texts)
    inside = bytearray(len(whole))  # 1 on a marker's characters
    for first, last in find_markers(whole, markers):
        inside[first:last] = b"\1" * (last - first)
    ends = accumulate(map(len, texts))
    return [any(inside[end - len(text) : end]) for text, end in zip(texts, ends, strict=True)]
