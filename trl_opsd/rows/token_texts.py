# SPDX-License-Identifier: Apache-2.0
"""The text of every token of a rollout, where it ends in the whole, and which tokens are of form alone."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

_MOST_NEWLINES = 8  # of a run, as in SGSD's official code
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


def text_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    """Of each token, the place where its text ends in the text without control tokens, which add nothing."""
    control = set(tokenizer.all_special_ids)
    texts = token_texts(tokenizer, ids)
    return tuple(accumulate(0 if token in control else len(text) for token, text in zip(ids, texts, strict=True)))


def tokens_of_form(tokenizer: Any) -> set[int]:
    """Ids of control tokens, of the marks of a think block and of runs of newlines, where each is one token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    for text in ("<think>", "</think>", *("\n" * count for count in range(1, _MOST_NEWLINES + 1))):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids |= set(encoded) if len(encoded) == 1 else set()
    return ids
