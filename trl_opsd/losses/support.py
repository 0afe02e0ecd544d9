# SPDX-License-Identifier: Apache-2.0
"""A divergence over likely tokens alone, for targets that were scored elsewhere or for papers that compare these only.

Against the full divergence only the vocabulary differs: entries outside the support are joined in one bucket or left
out by renormalising, so both sides remain distributions and the set can never be emptied to lower the loss.

The gradient needs no autograd either. With s the slope over the compared entries (`closed_form.py`) and q~ the
student's distribution over them, `s - q~ sum(s)` is the derivative with respect to their log-probabilities' logits. A
kept token takes its entry; a token in the bucket takes its share q_i / q_bucket of the bucket's; without a bucket 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

SUPPORTS = ("student", "target", "union")
REMAINDERS = ("tail", "renormalise")


class Places(NamedTuple):
    """The tokens that are compared one by one.

    Attributes:
        index: (..., K) int64 tokens.
        repeated: (..., K) bool, True where a union names a token again; None where it cannot.
    """

    index: torch.Tensor
    repeated: torch.Tensor | None = None


@dataclass(frozen=True)
class Support:
    """The tokens that a divergence compares, position by position.

    Args:
        k: tokens taken from the student, the target or each, >= 1; from the vocabulary's size on all are compared.
        of: `student`, `target` or `union`, whose likeliest tokens are compared.
        remainder: `tail` adds one bucket with the remaining mass of each side (SDPO, arXiv 2601.20802); `renormalise`
            divides by the kept mass, and is blind to mass outside.

    Raises:
        ValueError: for a value outside these ranges.
    """

    k: int
    of: str = "student"
    remainder: str = "tail"

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k} keeps no token; set k >= 1.")
        if self.of not in SUPPORTS:
            raise ValueError(f"of={self.of!r} is not known; set one of {SUPPORTS}.")
        if self.remainder not in REMAINDERS:
            raise ValueError(f"remainder={self.remainder!r} is not known; set one of {REMAINDERS}.")

    def places(self, log_q: torch.Tensor, log_p: torch.Tensor) -> Places | None:
        """The compared tokens of log-probabilities (..., V) of student and target; None where all are."""
        if self.k >= log_q.shape[-1]:
            return None
        sides = {"student": (log_q,), "target": (log_p,), "union": (log_q, log_p)}[self.of]
        index = torch.cat([side.detach().topk(self.k, dim=-1, sorted=False).indices for side in sides], dim=-1)
        if self.of != "union":
            return Places(index)
        first, second = index.split(self.k, dim=-1)
        seen = torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, first, True).gather(-1, second)
        return Places(index, torch.cat([torch.zeros_like(seen), seen], dim=-1))

    def restrict(self, log_prob: torch.Tensor, prob: torch.Tensor, places: Places) -> torch.Tensor:
        """Log-probabilities (..., K) over the compared tokens, or (..., K + 1) with the bucket as the last.

        A repeated token gets log-probability 0 on both sides: every divergence gives it a term and a slope of exactly 0.
        """
        kept = log_prob.gather(-1, places.index)
        if self.remainder == "renormalise":
            kept = _without(kept, places, -torch.inf).log_softmax(-1)
        kept = _without(kept, places, 0.0)
        if self.remainder == "renormalise":
            return kept
        rest = prob.scatter(-1, places.index, 0.0).sum(-1, keepdim=True)
        return torch.cat([kept, rest.clamp(min=torch.finfo(rest.dtype).tiny).log()], dim=-1)

    def spread(self, gradient: torch.Tensor, q: torch.Tensor, all_q: torch.Tensor, places: Places) -> torch.Tensor:
        """The gradient over the vocabulary (..., V) from the one over the compared entries.

        Args:
            gradient: (..., K) or (..., K + 1), `s - q~ sum(s)`.
            q: the student's probabilities of the same entries.
            all_q: (..., V) the student's probabilities.
            places: of these positions.
        """
        if self.remainder == "tail":
            whole = (all_q * (gradient[..., -1:] / q[..., -1:])).scatter_(-1, places.index, 0.0)
            gradient = gradient[..., :-1]
        else:
            whole = torch.zeros_like(all_q)
        return whole.scatter_add_(-1, places.index, _without(gradient, places, 0.0))


def _without(values: torch.Tensor, places: Places, fill: float) -> torch.Tensor:
    return values if places.repeated is None else values.masked_fill(places.repeated, fill)
