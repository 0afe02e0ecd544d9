# SPDX-License-Identifier: Apache-2.0
"""Answers read and compared by math-verify, safely: no exception, no alarm outside the main thread."""

import logging
import threading
from functools import lru_cache
from typing import Any

# math-verify's time limits are alarms, which only the main thread can set.
_PARSING_SECONDS, _COMPARING_SECONDS = 5, 5


@lru_cache(maxsize=65_536)
def parse_answer(text: str) -> tuple[Any, ...]:
    """math-verify's readings of the answer in a text, () where it reads none."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        return tuple(parse(text.strip(), parsing_timeout=_limit(_PARSING_SECONDS)))
    except Exception:  # whatever a parser of free text trips over, it found no answer
        return ()


def verifies(solution: str) -> bool:
    """Whether `solution` holds an answer that math-verify can read."""
    return bool(parse_answer(solution))


@lru_cache(maxsize=65_536)
def verify(completion: str, solution: str) -> bool:
    """Whether the answer in `completion` equals the one in `solution`; False where either cannot be read."""
    from math_verify import verify as equal

    gold, answer = parse_answer(solution), parse_answer(completion)
    if not gold or not answer:
        return False
    try:
        return bool(equal(list(gold), list(answer), timeout_seconds=_limit(_COMPARING_SECONDS)))
    except Exception:  # sympy raises many kinds on odd input
        return False


def _limit(seconds: int) -> int | None:
    return seconds if threading.current_thread() is threading.main_thread() else None
