# SPDX-License-Identifier: Apache-2.0
"""A divergence over likely tokens alone, for targets that were scored elsewhere or for papers that compare these only.

Against the full divergence only the vocabulary differs: entries outside the support are joined in one bucket or left
out by renormalising, so both sides remain distributions and the set can never be emptied to lower the loss.

The gradient needs no autograd either. With s the slope over the compared entries (`closed_form.py`) and q~ the
student's distribution over them, `s - q~ sum(s)` is the derivative with respect to their log-probabilities' logits. A
kept token takes its entry; a token in the bucket takes its share q_i / q_bucket of the bucket's; without a bucket 0.

The remainder `whole` is the exception: the kept entries are those of the whole vocabulary and sum to less than 1, so the
derivative is `s_i - q_i sum(s)` for every token of the vocabulary, with s = 0 outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

SUPPORTS = ("student", "target", "union", "intersection")
REMAINDERS = ("tail", "renormalise")
# For a policy gradient alone: the sampled token as the set, and kept entries of the whole vocabulary.
SAMPLED, WHOLE = "sampled", "whole"
# Log-probability of a slot that holds no token of the set, on both sides: its terms are 0, and so is its share of a softmax.
_LEFT_OUT = -1e30


class Places(NamedTuple):
    """The tokens that are compared one by one.

    Attributes:
        index: (..., K) int64 tokens.
        left_out: (..., K) bool, True where a union names a token again, or where an intersection lacks it; None where neither
            can be.
    """

    index: torch.Tensor
    left_out: torch.Tensor | None = None


@dataclass(frozen=True)
class Support:
    """The tokens that a divergence compares, position by position.

    Args:
        k: tokens taken from the student, the target or each, >= 1; from the vocabulary's size on all are compared.
        of: `student`, `target`, `union` or `intersection`, whose likeliest tokens are compared; an empty intersection compares
            nothing. `sampled` is the sampled token alone, whatever k is.
        remainder: `tail` adds one bucket with the remaining mass of each side (SDPO, arXiv 2601.20802); `renormalise`
            divides by the kept mass, and is blind to mass outside; `whole` leaves the kept entries as they are, which no
            divergence allows, but `policy_reverse_kl` does (Rethinking OPD, arXiv 2604.13016).

    Raises:
        ValueError: for a value outside these ranges.
    """

    k: int
    of: str = "student"
    remainder: str = "tail"

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k} keeps no token; set k >= 1.")
        if self.of not in (*SUPPORTS, SAMPLED):
            raise ValueError(f"of={self.of!r} is not known; set one of {(*SUPPORTS, SAMPLED)}.")
        if self.remainder not in (*REMAINDERS, WHOLE):
            raise ValueError(f"remainder={self.remainder!r} is not known; set one of {(*REMAINDERS, WHOLE)}.")

    def places(self, log_q: torch.Tensor, log_p: torch.Tensor, token_ids: torch.Tensor | None = None) -> Places | None:
        """The compared tokens of log-probabilities (..., V) of student and target; None where all are.

        Raises:
            ValueError: the sampled token is compared, and `token_ids` (...) is None.
        """
        if self.of == SAMPLED:
            if token_ids is None:
                raise ValueError(f"of={self.of!r} without token_ids; pass the sampled tokens.")
            return Places(token_ids.unsqueeze(-1))
        if self.k >= log_q.shape[-1]:
            return None
        if self.of in ("student", "target"):
            return Places(self._likeliest(log_q if self.of == "student" else log_p))
        first, second = self._likeliest(log_q), self._likeliest(log_p)
        if self.of == "intersection":
            return Places(first, ~_contained(first, second, log_q))
        repeated = _contained(second, first, log_q)
        return Places(torch.cat([first, second], dim=-1), torch.cat([torch.zeros_like(repeated), repeated], dim=-1))

    def restrict(self, log_prob: torch.Tensor, prob: torch.Tensor, places: Places) -> torch.Tensor:
        """Log-probabilities (..., K) over the compared tokens, or (..., K + 1) with the bucket as the last.

        A slot that is left out holds 0, which no floor raises; `leave_out` says later that nothing is there.
        """
        kept = log_prob.gather(-1, places.index)
        if self.remainder == "renormalise":
            kept = _without(kept, places, _LEFT_OUT).log_softmax(-1)
        kept = _without(kept, places, 0.0)
        if self.remainder != "tail":
            return kept
        rest = self._outside(prob, places).sum(-1, keepdim=True)
        return torch.cat([kept, rest.clamp(min=torch.finfo(rest.dtype).tiny).log()], dim=-1)

    def leave_out(self, log_prob: torch.Tensor, places: Places) -> torch.Tensor:
        """What `restrict` gave, with the log-probability of nothing in the slots that are left out."""
        if places.left_out is None:
            return log_prob
        mask = torch.nn.functional.pad(places.left_out, (0, log_prob.shape[-1] - places.left_out.shape[-1]))
        return log_prob.masked_fill(mask, _LEFT_OUT)

    def spread(self, slope: torch.Tensor, q: torch.Tensor, all_q: torch.Tensor, places: Places) -> torch.Tensor:
        """The gradient to the logits (..., V) from the slope over the compared entries.

        Args:
            slope: (..., K) or (..., K + 1), the derivative s with respect to their log-probabilities; 0 where a slot is left out.
            q: the student's probabilities of the same entries; 0 where a slot is left out.
            all_q: (..., V) the student's probabilities.
            places: of these positions.
        """
        total = slope.sum(-1, keepdim=True)
        if self.remainder == WHOLE:  # d log q_i / dz = 1[v = i] - q over the whole vocabulary
            return (all_q * -total).scatter_add_(-1, places.index, slope)
        gradient = slope.addcmul(q, total, value=-1)
        if self.remainder == "tail":
            whole = self._outside(all_q * (gradient[..., -1:] / q[..., -1:]), places)
            gradient = gradient[..., :-1]
        else:
            whole = torch.zeros_like(all_q)
        return whole.scatter_add_(-1, places.index, gradient)

    def _likeliest(self, log_prob: torch.Tensor) -> torch.Tensor:
        return log_prob.detach().topk(self.k, dim=-1, sorted=False).indices

    def _outside(self, values: torch.Tensor, places: Places) -> torch.Tensor:
        """Values (..., V) of tokens outside the set, 0 inside."""
        inside = torch.zeros((), dtype=values.dtype, device=values.device).expand(places.index.shape)
        if self.of == "intersection":
            inside = values.gather(-1, places.index).masked_fill(~places.left_out, 0.0)
        return values.scatter(-1, places.index, inside)


def _contained(tokens: torch.Tensor, others: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """Which tokens (..., K) are among `others` (..., K); `log_prob` (..., V) has the vocabulary's shape."""
    return torch.zeros_like(log_prob, dtype=torch.bool).scatter_(-1, others, True).gather(-1, tokens)


def _without(values: torch.Tensor, places: Places, fill: float) -> torch.Tensor:
    return values if places.left_out is None else values.masked_fill(places.left_out, fill)
