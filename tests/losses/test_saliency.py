# SPDX-License-Identifier: Apache-2.0
"""The objective of a mask on attention, its gradient and its step, entry by entry with `math`."""

import math

import pytest
import torch

from trl_opsd.losses.saliency import lifted, saliency, saliency_objective

VALUES = torch.tensor([[-1.0, -0.25, 7.0], [-3.0, 7.0, 7.0], [7.0, 7.0, 7.0]], dtype=torch.float64)
SHOWN = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def by_hand(log_probs, answers, values, shown, price):
    """Of one row; values of nothing that is shown are never read."""
    read = [math.exp(value) for value, kept in zip(values, shown, strict=True) if kept]
    said = [value for value, kept in zip(log_probs, answers, strict=True) if kept]
    return price * (sum(read) / len(read) if read else 0.0) - sum(said) / len(said)


def test_saliency_is_the_mean_share_that_is_left_of_the_reasoning():
    expected = [(math.exp(-1) + math.exp(-0.25)) / 2, math.exp(-3), 0.0]
    assert saliency(VALUES, SHOWN).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("price", [0.0, 0.1, 2.0])
def test_objective_and_gradient_equal_those_by_hand(price):
    log_probs = torch.tensor([[-0.5, -2.0], [-0.1, 9.0], [-4.0, -1.0]], dtype=torch.float64, requires_grad=True)
    answers = torch.tensor([[1, 1], [1, 0], [0, 1]])
    values = VALUES.clone().requires_grad_()
    got = saliency_objective(log_probs, answers, values, SHOWN, price)
    rows = zip(log_probs.tolist(), answers.tolist(), VALUES.tolist(), SHOWN.tolist(), strict=True)
    assert got.tolist() == pytest.approx([by_hand(*row, price) for row in rows], abs=1e-14)
    of_values, of_answers = torch.autograd.grad(got.sum(), (values, log_probs))
    pull = [[price * math.exp(-1) / 2, price * math.exp(-0.25) / 2, 0], [price * math.exp(-3), 0, 0], [0, 0, 0]]
    torch.testing.assert_close(of_values, torch.tensor(pull, dtype=torch.float64), rtol=0, atol=1e-15)
    assert of_answers.tolist() == [[-0.5, -0.5], [-1.0, 0.0], [0.0, -1.0]]


def test_a_step_goes_down_the_slope_and_never_above_zero():
    values, slope = torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([-0.5, -3.0, 2.0])
    assert lifted(values, slope, 0.5).tolist() == [-0.75, 0.0, -1.0]
