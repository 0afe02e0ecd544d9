# SPDX-License-Identifier: Apache-2.0
"""The text of every token of a rollout, and which tokens are part of a reflection marker."""

from collections.abc import Sequence
from typing import Any

from ..markers import find_markers

_INCOMPLETE = "\ufffd"
_WINDOW = 32


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; a character made of several tokens stands at its last one.

    The texts are those of tokens in their place: a tokenizer that drops a leading space when it decodes a single token
    keeps it here.
    """
    texts: list[str] = []
    start, seen = 0, ""
    for index in range(len(ids)):
        text = tokenizer.decode(ids[start : index + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith(_INCOMPLETE) and index + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(seen) :])
        seen = text
        if index - start >= _WINDOW:  # long rollouts in linear time
            start = index
            seen = tokenizer.decode(ids[start : index + 1], skip_special_tokens=False)
    return texts


def marker_flags(texts: Sequence[str], markers: Sequence[str]) -> list[bool]:
    """Whether each token holds a character of a reflection marker."""
    spans = find_markers("".join(texts), markers)
    flags, position = [], 0
    for text in texts:
        end = position + len(text)
        flags.append(any(position < last and first < end for first, last in spans))
        position = end
    return flags
