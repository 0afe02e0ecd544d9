# SPDX-License-Identifier: Apache-2.0
"""Which of many texts may have more tokens than a limit, without encoding most of them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
# The same text with only its words left, and with a letter for every letter.
_WORDS = bytes(byte if byte in _LETTERS else 32 for byte in range(256))
_SHAPE = bytes(97 if byte in _LETTERS else 32 if byte == 32 else 46 for byte in range(256))
_WORDS_KEPT = 1_000_000


class TokenCounts:
    """Token counts of a tokenizer, the cheapest sufficient one first.

    Args:
        tokenizer: a fast tokenizer is asked for each word once; of a slow one texts are encoded.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def _words(self) -> "_WordCounts | None":
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        # A copy: the tokenizer's own may be set to truncate or pad.
        return _WordCounts(Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str()))

    def may_exceed(self, texts: Sequence[str], limit: int) -> set[int]:
        """Indices of the texts that may have more than `limit` tokens, alone or within a prompt.

        A token is at least a byte; then by the words' counts; what is left is encoded in one call.
        """
        left = [index for index, text in enumerate(texts) if len(text) > limit or len(text.encode()) > limit]
        if left and self._words is not None:
            left = [index for index in left if self._words.bound(texts[index]) > limit]
        if not left:
            return set()
        encoded = self.tokenizer([texts[index] for index in left], add_special_tokens=False, verbose=False)
        return {index for index, ids in zip(left, encoded["input_ids"], strict=True) if len(ids) > limit}


class _WordCounts(dict):
    """Tokens of ASCII words, with a space in front where that takes more; each is encoded when first asked for."""

    def __init__(self, backend: Tokenizer):
        super().__init__()
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def __missing__(self, word: bytes) -> int:
        if len(self) >= _WORDS_KEPT:
            self.clear()
        text = word.decode()
        count = max(len(self._backend.encode(form, add_special_tokens=False)) for form in (f" {text}", text))
        self[word] = count
        return count

    def bound(self, text: str) -> int:
        """More tokens than `text` has: its words', and one for every other byte but a space in front of a word.

        Tokenizers split at words, so merges across their ends, which could only in theory take more tokens, are rare.
        """
        data = text.encode()
        shape = data.translate(_SHAPE)
        others = len(data) - shape.count(b"a") - shape.count(b" a")
        return others + sum(map(self.__getitem__, data.translate(_WORDS).split()))
