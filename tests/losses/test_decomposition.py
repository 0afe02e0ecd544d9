# SPDX-License-Identifier: Apache-2.0
"""The decomposition of the teacher's signal against its formula in plain Python."""

import math

import pytest
import torch

from trl_opsd.losses import decompose_signal


def log_probabilities(logits):
    total = math.log(sum(math.exp(z) for z in logits))
    return [z - total for z in logits]


@pytest.mark.parametrize("num_tokens", [None, 4])
def test_norms_and_cosines_equal_the_formula_in_plain_python(num_tokens):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(2, 3, 6, dtype=torch.float64, generator=generator) * 3 for _ in range(3)]
    found = decompose_signal(*views, num_tokens=num_tokens)
    for row in range(2):
        for position in range(3):
            q, t, r = (log_probabilities(view[row, position, : num_tokens or 6].tolist()) for view in views)
            total = [a - b for a, b in zip(t, q, strict=True)]
            induced = [a - b for a, b in zip(r, q, strict=True)]
            conditioned = [a - b for a, b in zip(t, r, strict=True)]

            def dot(x, y):
                return sum(a * b for a, b in zip(x, y, strict=True))

            def cosine(x, y):
                return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))

            want = [
                math.sqrt(dot(total, total)),
                math.sqrt(dot(induced, induced) / dot(total, total)),
                math.sqrt(dot(conditioned, conditioned) / dot(total, total)),
                cosine(induced, total),
                cosine(conditioned, total),
                cosine(induced, conditioned),
            ]
            assert [values[row, position].item() for values in found] == pytest.approx(want, abs=1e-12)


def test_a_teacher_that_needs_no_problem_is_all_reference():
    student, teacher = torch.randn(5, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)
    found = decompose_signal(student, teacher, teacher)
    assert found.reference_ratio == pytest.approx(1) and found.reference_cosine == pytest.approx(1)
    assert found.question_ratio == found.question_cosine == found.parts_cosine == 0


def test_a_reference_that_says_what_the_student_says_is_all_question():
    student, teacher = torch.randn(5, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)
    found = decompose_signal(student, teacher, student)
    assert found.question_ratio == pytest.approx(1) and found.question_cosine == pytest.approx(1)
    assert found.reference_ratio == found.reference_cosine == 0


def test_equal_views_give_zeros_and_no_nan():
    logits = torch.randn(2, 5)
    assert all((values == 0).all() for values in decompose_signal(logits, logits, logits))


def test_a_token_that_no_view_can_have_counts_as_if_it_were_not_there():
    views = [torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    kept = [0, 1, 3, 5]
    want = decompose_signal(*(view[:, kept] for view in views))
    for view in views:
        view[:, [2, 4]] = -torch.inf
    torch.testing.assert_close(decompose_signal(*views), want, rtol=0, atol=1e-12)


def test_unequal_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="student, teacher and reference"):
        decompose_signal(torch.zeros(2, 5), torch.zeros(1, 5), torch.zeros(2, 5))
