# SPDX-License-Identifier: Apache-2.0
"""How much of a rollout is distilled: a constant number of tokens, or one that grows (arXiv 2605.31490)."""

import re
from typing import NamedTuple

_GROWING = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)\s+in\s+(\d+)\s*")


class Horizon(NamedTuple):
    """A length that grows linearly.

    Attributes:
        start: tokens at the first step.
        end: tokens after `steps` optimizer steps, and from then on.
        steps: that the growth takes.
    """

    start: int
    end: int
    steps: int

    def at(self, step: int) -> int:
        """Tokens after `step` optimizer steps."""
        return round(self.start + (self.end - self.start) * min(1.0, step / self.steps))


def read_length(value: int | str | None) -> int | Horizon | None:
    """A `distillation_length`: tokens, or text as "256..1024 in 50".

    Raises:
        ValueError: it is no positive number, or does not grow; says what to write.
    """
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    growing = _GROWING.fullmatch(value) if isinstance(value, str) else None
    length = Horizon(*map(int, growing.groups())) if growing else number
    if length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0):
        return length
    if isinstance(length, Horizon) and 0 < length.start < length.end and length.steps > 0:
        return length
    raise ValueError(
        f"distillation_length={value!r} is not valid; set it to a positive number of tokens, None for all, or a growing one as "
        "'256..1024 in 50': 256 at the first step, linearly more up to 1024 after 50 steps."
    )
