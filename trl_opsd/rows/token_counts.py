# SPDX-License-Identifier: Apache-2.0
"""Which of many texts may have more tokens than a limit, without encoding most of them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OUTSIDE_ASCII = 0x80
_FIRST_OF_CHARACTER = 0xC0  # in UTF-8, the byte that begins a character outside ASCII is at least this
# The same text with a dot for every byte that is no letter and no space, and within ASCII.
_SHAPE = bytes(b if b in _LETTERS or b == 32 or b >= _OUTSIDE_ASCII else ord(".") for b in range(256))
_PIECES_KEPT = 1_000_000
_TEXTS_AT_ONCE = 100  # more no longer fit a core's cache


class TokenCounts:
    """Token counts of a tokenizer, the cheapest sufficient one first.

    Args:
        tokenizer: a fast tokenizer is asked for each word once; of a slow one texts are encoded.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def pieces(self) -> "PieceCounts | None":
        """Bounds by pieces of text; None for a slow tokenizer, which need not split at words."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        # A copy: the tokenizer's own may be set to truncate or pad.
        return PieceCounts(Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str()))

    def may_exceed(self, texts: Sequence[str], limit: int) -> set[int]:
        """Indices of the texts that may have more than `limit` tokens, alone or within a prompt.

        A token is at least a byte; then by the counts of pieces; what is left is encoded in one call.
        """
        left = [index for index, text in enumerate(texts) if len(text) > limit or len(text.encode()) > limit]
        if left and self.pieces is not None:
            bounds = self.pieces.bounds([texts[index] for index in left])
            left = [index for index, bound in zip(left, bounds, strict=True) if bound > limit]
        if not left:
            return set()
        encoded = self.tokenizer([texts[index] for index in left], add_special_tokens=False, verbose=False)
        return {index for index, ids in zip(left, encoded["input_ids"], strict=True) if len(ids) > limit}


class PieceCounts(dict):
    """Tokens that a piece of text has at most; each is encoded when first asked for.

    A piece begins with a word in ASCII letters and the space in front of it, or with one character outside ASCII, and
    holds what follows up to the next. Words and characters are encoded; of what follows, every byte counts as a token.
    """

    def __init__(self, backend: Tokenizer):
        super().__init__()
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def __missing__(self, piece: bytes) -> int:
        if len(self) >= _PIECES_KEPT:
            self.clear()
        core = piece.strip(b" .")
        text, others = core.decode(), len(piece) - len(core)
        alone, behind_space = (self._num_tokens(form) for form in (text, f" {text}"))
        if core.isalpha():
            count = others - piece.startswith(b" ") + max(alone, behind_space)
        else:  # its space is counted with the piece in front
            count = others + max(alone, behind_space - 1)
        self[piece] = count
        return count

    def _num_tokens(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False))

    def bounds(self, texts: Sequence[str]) -> list[int]:
        """For each text no less than its tokens.

        Tokenizers split at words, so merges across their ends, which could only in theory take more tokens, are rare.
        """
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        return [bound for start in starts for bound in self._bounds_of_few(texts[start : start + _TEXTS_AT_ONCE])]

    def _bounds_of_few(self, texts: Sequence[str]) -> list[int]:
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([0, *map(len, encoded)])
        data = b"".join(encoded).translate(_SHAPE)
        places = np.append(np.flatnonzero(_piece_starts(np.frombuffer(data, np.uint8), ends)), len(data))
        buffers = [None, pa.py_buffer(places.astype(np.int64)), pa.py_buffer(data)]
        pieces = pa.Array.from_buffers(pa.large_binary(), len(places) - 1, buffers).dictionary_encode()
        counts = np.array([self[piece] for piece in pieces.dictionary.to_pylist()], np.int64)
        sums = np.append(0, np.cumsum(counts[pieces.indices.to_numpy()]))
        return np.diff(sums[np.searchsorted(places, ends)]).tolist()


def _piece_starts(shape: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether a piece starts at each byte.

    Args:
        shape: bytes (S,) of all texts, as `_SHAPE` leaves them.
        ends: place (T + 1,) of the first byte of each text, and S.

    Returns:
        (S,) bool.
    """
    letter, space = (shape >= ord("A")) & (shape < _OUTSIDE_ASCII), shape == ord(" ")
    starts = shape >= _FIRST_OF_CHARACTER
    starts[:-1] |= space[:-1] & letter[1:]
    starts[1:] |= letter[1:] & ~(letter | space)[:-1]
    starts[ends[ends < len(shape)]] = True
    return starts
