# SPDX-License-Identifier: Apache-2.0
"""Weights of outcomes: the formula rollout by rollout, and what it does to a batch."""

import pytest

from trl_opsd.losses import outcome_weights


def by_rollout(right):
    """Every rollout's weight as RESD's paper has it: the share of right ones is kept off 0 and 1, the mean is divided out."""
    share = min(max(sum(right) / len(right), 1 / len(right)), 1 - 1 / len(right))
    weights = [1 - share if is_right else share for is_right in right]
    return [weight / (sum(weights) / len(weights)) for weight in weights]


@pytest.mark.parametrize(("num_right", "num_wrong"), [(r, w) for r in range(6) for w in range(6) if r + w > 1])
def test_the_weights_are_those_of_the_formula_rollout_by_rollout(num_right, num_wrong):
    of_right, of_wrong = outcome_weights(num_right, num_wrong)
    got = [of_right] * num_right + [of_wrong] * num_wrong
    assert got == pytest.approx(by_rollout([True] * num_right + [False] * num_wrong), rel=1e-14)
    assert sum(got) == pytest.approx(len(got))


@pytest.mark.parametrize("counts", [(3, 3), (1, 1), (4, 0), (0, 5), (0, 0), (1, 0)])
def test_half_right_or_one_outcome_gives_all_ones(counts):
    assert outcome_weights(*counts) == (1.0, 1.0)


def test_both_outcomes_weigh_the_same_together_and_the_rarer_one_more_each():
    of_right, of_wrong = outcome_weights(2, 30)
    assert 2 * of_right == pytest.approx(30 * of_wrong) == pytest.approx(16)
