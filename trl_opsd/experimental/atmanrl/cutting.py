# SPDX-License-Identifier: Apache-2.0
"""Where in a rollout the reasoning ends and the answer begins."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ...rows.token_texts import text_ends


class CutRollout(NamedTuple):
    """Token ids of a rollout in three parts; the tail begins with the marker, and `is_answer` tells what follows it."""

    prompt: list[int]
    reasoning: list[int]
    tail: list[int]
    is_answer: list[bool]


def cut_rollout(
    tokenizer: Any, prompt: Sequence[int], completion: Sequence[int], marker: str, longest: int
) -> CutRollout | None:
    """The parts of a rollout; None where it has no marker, no reasoning before it or no answer behind it.

    A token that the marker touches belongs to the tail. The first token of the tail is never of the answer: what predicts it is a
    token of the reasoning, whose attention no mask changes.

    Args:
        tokenizer: the model's.
        prompt, completion: token ids, control tokens included.
        marker: see `SaliencySettings.answer_marker`.
        longest: tokens of the answer that are kept.
    """
    text = tokenizer.decode(completion, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    start = text.rfind(marker)
    ends = text_ends(tokenizer, completion)
    if start < 0:
        return None
    first = next(index for index, end in enumerate(ends) if end > start)
    behind = start + len(marker)
    answer = [i for i, (left, end) in enumerate(pairwise((0, *ends))) if i > first and end > behind and end > left]
    if not answer or not first:
        return None
    tail = range(first, answer[:longest][-1] + 1)
    kept = set(answer)
    ids = list(completion)
    return CutRollout(list(prompt), ids[:first], [ids[i] for i in tail], [i in kept for i in tail])
