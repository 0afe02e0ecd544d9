# SPDX-License-Identifier: Apache-2.0
"""Spans that somebody marked in a text, and the tokens that they touch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# What a mark says of a token: it is in a key span, or in an error span.
MARKS = {"K": 1.0, "E": -1.0}


class Span(NamedTuple):
    """Characters `start` to `end` (not included) of a text, a kind of `MARKS` and a type in words."""

    start: int
    end: int
    kind: str
    type: str


def read_spans(found: Any, length: int) -> tuple[Span, ...] | Exception:
    """Spans of a text, from a list of (start, end, kind, type) or of objects with these keys.

    Args:
        found: None for no span; an error is returned as it is.
        length: of the text, in characters.

    Returns:
        The spans, or an error where one of them is none of the text.
    """
    if isinstance(found, Exception):
        return found
    try:
        rows = [[span[name] for name in Span._fields] if isinstance(span, Mapping) else span for span in found or ()]
        spans = tuple(Span(int(start), int(end), kind, str(name)) for start, end, kind, name in rows)
    except (KeyError, TypeError, ValueError) as error:
        return ValueError(f"spans: {error}")
    good = all(0 <= span.start < span.end <= length and span.kind in MARKS and span.type.strip() for span in spans)
    return spans if good else ValueError(f"spans: {spans} do not fit a text of {length} characters")


def token_marks(spans: Sequence[tuple[int, int, str, str]], token_ends: Sequence[int]) -> list[float]:
    """Of each token the mark of a span that touches it, the later of two, 0 elsewhere.

    Args:
        spans: of a text.
        token_ends: of each token, the place in the text where its own ends.
    """
    marks = [0.0] * len(token_ends)
    for start, end, kind, _ in spans:
        for index, (first, last) in enumerate(zip((0, *token_ends), token_ends, strict=False)):
            if max(first, start) < min(last, end):
                marks[index] = MARKS[kind]
    return marks
