# SPDX-License-Identifier: Apache-2.0
"""The loss of a denoising step, entry by entry with `math` in float64, and its choice of positions by hand."""

import math

import pytest
import torch

from trl_opsd.losses import Divergence, Support, current_block, denoising_divergence, surest_positions, token_divergence

AUTHORS = Divergence(
    "reverse_kl", clip="upper", clip_value=0.05, support=Support(20, of="target", remainder="renormalise")
)


def draw(n=3, positions=2, vocabulary=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, positions, vocabulary)
    return [3 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]


def state_by_hand(student, teacher, k, clip):
    """Sum over positions of clipped terms q (log q - log p) over the teacher's k likeliest tokens, both sides renormalised."""
    total = 0.0
    for own, wanted in zip(student.tolist(), teacher.tolist(), strict=True):
        kept = sorted(range(len(wanted)), key=lambda token: -wanted[token])[:k]
        q_sum = sum(math.exp(own[token]) for token in kept)
        p_sum = sum(math.exp(wanted[token]) for token in kept)
        for token in kept:
            q, p = math.exp(own[token]) / q_sum, math.exp(wanted[token]) / p_sum
            term = q * (math.log(q) - math.log(p))
            total += term if clip is None else min(term, clip)
    return total


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_state_is_the_clipped_reverse_kl_over_the_teachers_likeliest_tokens(k, clip):
    student, teacher = draw()
    support = Support(k, of="target", remainder="renormalise")
    rule = Divergence("reverse_kl", clip=None if clip is None else "upper", clip_value=clip or 1.0, support=support)
    sums, facts = denoising_divergence(student, teacher, rule)
    for row in range(len(student)):
        assert sums[row].item() == pytest.approx(state_by_hand(student[row], teacher[row], k, clip), abs=1e-12)
        unclipped = state_by_hand(student[row], teacher[row], k, None)
        assert facts["divergence"][row].item() == pytest.approx(unclipped, abs=1e-12)


def test_the_gradient_of_a_state_is_that_of_finite_differences():
    student, teacher = draw(n=1)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: denoising_divergence(logits, teacher, AUTHORS)[0], (student,))


def test_a_teacher_that_says_what_the_student_says_leaves_no_loss_and_no_gradient():
    student, _ = draw()
    student.requires_grad_()
    sums, facts = denoising_divergence(student, student.detach().clone(), AUTHORS)
    sums.sum().backward()
    assert not sums.any() and not facts["divergence"].any() and student.grad.abs().max() < 1e-15


def test_over_the_whole_vocabulary_without_a_clip_a_state_is_the_sum_of_reverse_kls():
    student, teacher = draw()
    rule = Divergence("reverse_kl", support=Support(30, of="target", remainder="renormalise"))
    expected = token_divergence(student, teacher, divergence="reverse_kl").sum(-1)
    torch.testing.assert_close(denoising_divergence(student, teacher, rule)[0], expected)


def test_the_share_of_cut_entries_counts_terms_above_the_bound():
    student, teacher = draw(n=1)
    rule = Divergence("reverse_kl", clip="upper", clip_value=0.05)
    q, p = student.softmax(-1), teacher.softmax(-1)
    expected = (q * (q.log() - p.log()) > 0.05).double().mean()
    assert 0 < expected < 1
    assert denoising_divergence(student, teacher, rule)[1]["clipped_share"].item() == pytest.approx(expected.item())


def test_the_current_block_is_that_of_the_first_masked_position():
    masked = torch.tensor(
        [
            [0, 1, 0, 1, 1, 1, 1, 1],  # in the first block
            [0, 0, 0, 0, 1, 1, 0, 1],  # in the second
        ]
    ).bool()
    expected = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 1]]).bool()
    assert torch.equal(current_block(masked, 4), expected)


def test_a_state_without_a_mask_has_no_current_block():
    with pytest.raises(ValueError, match="masked has a row without a masked position"):
        current_block(torch.tensor([[True, False], [False, False]]), 1)


def test_positions_are_chosen_by_the_raw_logit_and_not_by_the_probability():
    logits = torch.zeros(1, 4, 5)
    logits[0, 0] = torch.tensor([9.0, 9, 9, 9, 9])  # undecided, and high
    logits[0, 1] = torch.tensor([5.0, -5, -5, -5, -5])  # sure
    logits[0, 2] = torch.tensor([7.0, 6, 6, 6, 6])
    logits[0, 3] = 99.0  # no candidate
    candidates = torch.tensor([[True, True, True, False]])
    assert surest_positions(logits, candidates, 2).tolist() == [[0, 2]]


def test_fewer_candidates_than_positions_are_refused():
    with pytest.raises(ValueError, match="count=2, but a state has 1 candidates"):
        surest_positions(torch.zeros(1, 3, 4), torch.tensor([[True, False, False]]), 2)
