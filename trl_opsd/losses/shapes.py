# SPDX-License-Identifier: Apache-2.0
"""What the student is pulled to, as logits, and the one form all targets share.

Every target is `anchor + shape(direction)`. With a linear output head both are projections of hidden states,
so a method is an anchor, a direction and a shape:

    OPSD       anchor = teacher view   no direction                          Shape()
    OGLS-SD    anchor = plain view     mean right views - mean wrong views   LinearShape(strength)
    Purified   anchor = plain view     teacher view - reference-only view    BoundedShape(c, beta)
    DemoPSD    anchor = teacher view   plain view - teacher view             MixtureShape(a, beta), which reads both

Temperature: each frozen view is divided by T first and shaped then; the target is not tempered again. For a
linear shape this is the same as tempering the steered logits, for a bounded one it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .divergences import compute_dtype, require_positive
from .forms import FORMS


@dataclass(frozen=True)
class Shape:
    """How the direction enters the target. This one: not at all, the target is the anchor alone (OPSD).

    A shape that moves the anchor maps (..., V) direction logits to a (..., V) shift of the anchor's logits. One that
    has `reads_anchor` is also given the anchor's, as the keyword `anchor_logits`.
    """

    uses_direction = False
    reads_anchor = False


@dataclass(frozen=True)
class LinearShape(Shape):
    """The direction times `strength` (OGLS-SD's lambda), a finite number >= 0; else a ValueError."""

    strength: float
    uses_direction = True

    def __post_init__(self):
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength={self.strength} is not a finite number >= 0; set one, 0 for no steering.")

    def __call__(self, direction_logits: torch.Tensor) -> torch.Tensor:
        """(..., V) direction to (..., V) shift of the anchor's logits."""
        return direction_logits * self.strength


@dataclass(frozen=True)
class BoundedShape(Shape):
    """The direction, centred over the vocabulary and bounded by a tanh (Purified OPSD, arXiv 2607.02234).

    Args:
        tanh_bound: the paper's c, > 0: no token moves by more than this many nats before the division.
        conservativeness: the paper's beta, > 0: the shift is divided by it, so larger stays closer to the
            anchor.

    Raises:
        ValueError: for a value that is not > 0.
    """

    tanh_bound: float = 10.0
    conservativeness: float = 1.0
    uses_direction = True

    def __post_init__(self):
        require_positive("tanh_bound", self.tanh_bound)
        require_positive("conservativeness", self.conservativeness)

    def __call__(self, direction_logits: torch.Tensor) -> torch.Tensor:
        """(..., V) direction to (..., V) shift; a constant added to the direction changes nothing."""
        centred = direction_logits - direction_logits.mean(-1, keepdim=True)
        return self.tanh_bound / self.conservativeness * torch.tanh(centred / self.tanh_bound)


@dataclass(frozen=True)
class MixtureShape(Shape):
    """The geometric mix of two views, nearer to the other view the more they disagree (DemoPSD, arXiv 2607.02502).

    The anchor is the view T and the direction S - T, so the target is `norm(T^(1-a) S^a)` with, position by position,
    `a = 2 a_max (sigmoid(sensitivity * d) - 1/2)` and d = JSD_1/2(S, T) of the tempered views, in [0, log 2] nats.

    Args:
        a_max: largest share of S, in [0, 1]; 0 is the anchor alone. The paper's is 0.15.
        sensitivity: the paper's beta, > 0: 25 to 100 there, by domain.

    Raises:
        ValueError: for a value outside these ranges.
    """

    a_max: float = 0.15
    sensitivity: float = 50.0
    uses_direction = True
    reads_anchor = True

    def __post_init__(self):
        if not 0 <= self.a_max <= 1:
            raise ValueError(f"a_max={self.a_max} is outside [0, 1]; set the largest share of the direction's view.")
        require_positive("sensitivity", self.sensitivity)

    def __call__(self, direction_logits: torch.Tensor, *, anchor_logits: torch.Tensor) -> torch.Tensor:
        """(..., V) direction and anchor to (..., V) shift; a constant added to either changes nothing."""
        return direction_logits * self.share(direction_logits, anchor_logits)

    def share(self, direction_logits: torch.Tensor, anchor_logits: torch.Tensor) -> torch.Tensor:
        """(..., 1) share a of S, in [0, a_max]."""
        log_t = anchor_logits.log_softmax(-1)
        log_s = (anchor_logits + direction_logits).log_softmax(-1)
        distance = FORMS["jsd"].terms(log_s, log_t, 0.5).sum(-1, keepdim=True).clamp(min=0)
        return self.a_max * torch.tanh(self.sensitivity / 2 * distance)  # = 2 a_max (sigmoid(beta d) - 1/2)


def steered_logits(
    base_logits: torch.Tensor,
    positive_logits: torch.Tensor,
    negative_logits: torch.Tensor,
    *,
    strength: float,
) -> torch.Tensor:
    """Logits of the plain view moved along mean(positive) - mean(negative) (OGLS-SD, arXiv 2605.12400).

    Args:
        base_logits: (..., V) raw logits without privileged text.
        positive_logits: (P, ..., V) raw logits, one row per right context, P >= 1.
        negative_logits: (M, ..., V) raw logits, one row per wrong context, M >= 1.
        strength: lambda, >= 0.

    Returns:
        (..., V) detached logits, float32 or float64. Temper them afterwards, the form is linear.

    Raises:
        ValueError: for an empty pool, for shapes that do not match, for a negative strength.
    """
    shape = LinearShape(strength)
    for field, pool in (("positive_logits", positive_logits), ("negative_logits", negative_logits)):
        if pool.shape[1:] != base_logits.shape or not len(pool):
            raise ValueError(
                f"{field} has shape {tuple(pool.shape)}; pass at least one context on the first axis and "
                f"{tuple(base_logits.shape)} behind it, and skip a prompt whose pool is empty."
            )
    dtype = compute_dtype(base_logits.dtype)
    base, positive, negative = (x.detach().to(dtype) for x in (base_logits, positive_logits, negative_logits))
    return base + shape(positive.mean(0) - negative.mean(0))


def purified_logits(
    base_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    tanh_bound: float = 10.0,
    conservativeness: float = 1.0,
    num_tokens: int | None = None,
) -> torch.Tensor:
    """Logits of the plain view moved by what the teacher knows beyond the reference alone (arXiv 2607.02234).

    Args:
        base_logits: (..., V) of the frozen model that reads the question.
        teacher_logits: (..., V) of the frozen model that reads question and reference.
        reference_logits: (..., V) of the frozen model that reads the reference without the question.
        tanh_bound, conservativeness: see [`BoundedShape`].
        num_tokens: take the mean and the softmax over the first `num_tokens` entries only, in [1, V]; the
            entries behind are -inf. Output matrices often have more rows than the tokenizer has tokens.

    Returns:
        (..., V) detached log-probabilities. With a temperature divide the three inputs by it, not this.

    Raises:
        ValueError: for shapes that differ or a setting out of range.
    """
    shape = BoundedShape(tanh_bound, conservativeness)
    for field, logits in (("teacher_logits", teacher_logits), ("reference_logits", reference_logits)):
        if logits.shape != base_logits.shape:
            raise ValueError(
                f"{field} has shape {tuple(logits.shape)} and base_logits {tuple(base_logits.shape)}; "
                "pass equal shapes."
            )
    size = base_logits.shape[-1]
    num_tokens = check_num_tokens(num_tokens, size)
    dtype = compute_dtype(base_logits.dtype)
    views = (base_logits, teacher_logits, reference_logits)
    base, teacher, reference = (view.detach()[..., :num_tokens].to(dtype).log_softmax(-1) for view in views)
    target = torch.log_softmax(base + shape(teacher - reference), dim=-1)
    return torch.nn.functional.pad(target, (0, size - num_tokens), value=-torch.inf)


def check_num_tokens(num_tokens: int | None, vocabulary_size: int) -> int:
    """`num_tokens`, or the whole vocabulary for None.

    Raises:
        ValueError: unless 1 <= num_tokens <= vocabulary_size.
    """
    if num_tokens is None:
        return vocabulary_size
    if not 1 <= num_tokens <= vocabulary_size:
        raise ValueError(
            f"num_tokens={num_tokens} is outside [1, {vocabulary_size}]; set the number of tokens of the "
            "tokenizer, at most the rows of the output head, or None for all rows."
        )
    return num_tokens
