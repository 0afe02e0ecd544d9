# SPDX-License-Identifier: Apache-2.0
"""The text of every token of a rollout, and which tokens are part of a reflection marker."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..monitoring.markers import REFLECTION_MARKERS, find_markers

_INCOMPLETE = "\ufffd"
_WINDOW = 32
_LONGEST_CHARACTER = 4  # bytes, and so tokens; more that make no character are none


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; a character made of several tokens stands at its last one.

    The texts are those of tokens in their place: a tokenizer that drops a leading space when it decodes a single token
    keeps it here.
    """
    texts: list[str] = []
    start, seen = 0, ""
    for index in range(len(ids)):
        text = tokenizer.decode(ids[start : index + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_last = index + 1 == len(ids) or index - start >= _WINDOW + _LONGEST_CHARACTER
        if text.endswith(_INCOMPLETE) and not is_last:
            texts.append("")
            continue
        texts.append(text[len(seen) :])
        seen = text
        if index - start >= _WINDOW:  # long rollouts in linear time
            start = index
            seen = tokenizer.decode(ids[start : index + 1], skip_special_tokens=False)
    return texts


def marker_flags(texts: Sequence[str], markers: Sequence[str] = REFLECTION_MARKERS) -> list[bool]:
    """Whether each token holds a character of a reflection marker."""
    whole = "".join(texts)
    inside = bytearray(len(whole))  # 1 on a marker's characters
    for first, last in find_markers(whole, markers):
        inside[first:last] = b"\1" * (last - first)
    ends = accumulate(map(len, texts))
    return [any(inside[end - len(text) : end]) for text, end in zip(texts, ends, strict=True)]
