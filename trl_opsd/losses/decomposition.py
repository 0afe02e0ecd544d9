# SPDX-License-Identifier: Apache-2.0
"""How much of a privileged teacher's signal the reference alone explains (Purified OPSD's diagnosis, arXiv 2607.02234).

    log p_T - log q  =  (log p_R - log q)  +  (log p_T - log p_R)
        total           reference-induced     question-conditioned

q is the student, p_T the teacher that reads problem and solution, p_R the one that reads the solution alone.
"""

from typing import NamedTuple

import torch

from .divergences import compute_dtype
from .shapes import check_num_tokens


class SignalDecomposition(NamedTuple):
    """The three log-ratios of a position, as vectors over the vocabulary.

    Attributes:
        total_norm: (...) Euclidean norm of the total, in nats.
        reference_ratio: (...) norm of the reference-induced part over the total's.
        question_ratio: (...) norm of the question-conditioned part over the total's.
        reference_cosine: (...) cosine of the reference-induced part and the total, in [-1, 1].
        question_cosine: (...) cosine of the question-conditioned part and the total.
        parts_cosine: (...) cosine of the two parts.
    """

    total_norm: torch.Tensor
    reference_ratio: torch.Tensor
    question_ratio: torch.Tensor
    reference_cosine: torch.Tensor
    question_cosine: torch.Tensor
    parts_cosine: torch.Tensor


def decompose_signal(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    num_tokens: int | None = None,
) -> SignalDecomposition:
    """Norms and cosines of the teacher's signal and its two parts.

    Args:
        student_logits: (..., V) of the student, which reads the problem.
        teacher_logits: (..., V) of the teacher, which reads problem and solution.
        reference_logits: (..., V) of the teacher reading the solution without the problem.
        num_tokens: use the first so many entries, in [1, V]; None for all.

    Returns:
        Float32 or float64; where a norm is 0, its cosines are 0, and where the total's is, the ratios are.

    Raises:
        ValueError: shapes differ, or `num_tokens` is out of range.
    """
    if not student_logits.shape == teacher_logits.shape == reference_logits.shape:
        shapes = [tuple(x.shape) for x in (student_logits, teacher_logits, reference_logits)]
        raise ValueError(f"student, teacher and reference logits have shapes {shapes}; pass equal ones.")
    num_tokens = check_num_tokens(num_tokens, student_logits.shape[-1])
    dtype = compute_dtype(student_logits.dtype)
    student, teacher, reference = (
        logits.detach()[..., :num_tokens].to(dtype).log_softmax(-1)
        for logits in (student_logits, teacher_logits, reference_logits)
    )
    total, induced, conditioned = (
        (a - b).masked_fill(a == b, 0.0)  # of two -inf too
        for a, b in ((teacher, student), (reference, student), (teacher, reference))
    )
    norms = [part.norm(dim=-1) for part in (total, induced, conditioned)]
    return SignalDecomposition(
        total_norm=norms[0],
        reference_ratio=_ratio(norms[1], norms[0]),
        question_ratio=_ratio(norms[2], norms[0]),
        reference_cosine=_ratio((induced * total).sum(-1), norms[1] * norms[0]),
        question_cosine=_ratio((conditioned * total).sum(-1), norms[2] * norms[0]),
        parts_cosine=_ratio((induced * conditioned).sum(-1), norms[1] * norms[2]),
    )


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
