# SPDX-License-Identifier: Apache-2.0
"""How much of a rollout says again what it said: the mark of a model that loops."""

import zlib
from collections.abc import Sequence

LOOP_CHARACTERS = 10_000
LOOP_COMPRESSION = 10.0


def repeated_share(rollouts: Sequence[Sequence[int]], length: int = 4) -> float:
    """Share of the `length`-grams of rollouts that stood in the same rollout before.

    Args:
        rollouts: token ids of each.
        length: tokens of an n-gram, 1 or more.

    Returns:
        In [0, 1): 0 where nothing repeats or every rollout is shorter than `length`, near 1 for a loop.
    """
    repeated, total = count_repeated(rollouts, length)
    return repeated / total if total else 0.0


def count_repeated(rollouts: Sequence[Sequence[int]], length: int = 4) -> tuple[int, int]:
    """Repeated n-grams and all n-grams, to be added up over processes; see [`repeated_share`]."""
    repeated = total = 0
    for ids in rollouts:
        count = max(len(ids) - length + 1, 0)
        repeated += count - len(set(zip(*(ids[start:] for start in range(length)), strict=False)))
        total += count
    return repeated, total


def is_loop(text: str) -> bool:
    """Whether a text has more than 10,000 characters, the last 10,000 of which zlib makes more than 10 times shorter.

    So StableOPD (arXiv 2604.08527) counts repetition. Prose becomes 2 to 4 times shorter. A shorter text is none, however it repeats.
    """
    if len(text) <= LOOP_CHARACTERS:
        return False
    end = text[-LOOP_CHARACTERS:].encode("utf-8", "replace")
    return len(end) > LOOP_COMPRESSION * len(zlib.compress(end))
