# SPDX-License-Identifier: Apache-2.0
"""The first steps of a reference solution: of several lines a step is a line, of one line a sentence."""

import math
import re

_LINE = re.compile(r"[^\n]+")
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s|\Z)|[。！？]|\Z)", re.DOTALL)


def first_steps(solution: str | None, share: float) -> str | None:
    """The solution up to the end of its first steps, in its own characters; a share of 1 is the solution itself.

    Args:
        solution: text, or None.
        share: of its steps, above 0 and at most 1; rounded up to whole ones, so at least one is shown.
    """
    if solution is None or share >= 1:
        return solution
    ends = step_ends(solution)
    return solution[: ends[math.ceil(share * len(ends) - 1e-9) - 1]] if ends else solution


def step_ends(solution: str) -> list[int]:
    """The place behind each step: lines that are not blank, or where there is one alone its sentences."""
    lines = [match.end() for match in _LINE.finditer(solution) if not match[0].isspace()]
    return lines if len(lines) > 1 else [match.end() for match in _SENTENCE.finditer(solution)]
