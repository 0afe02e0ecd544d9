# SPDX-License-Identifier: Apache-2.0
"""Running moments against those of all numbers at once."""

import json

import pytest
import torch

from trl_opsd.losses import RunningMoments

VALUES = [0.0, 1.1, 0.0, 1.05, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("cut", range(len(VALUES) + 1))
def test_moments_in_two_parts_and_through_json_are_those_of_all_numbers(cut):
    first = RunningMoments(*json.loads(json.dumps(RunningMoments().with_values(VALUES[:cut]))))
    moments, whole = first.with_values(VALUES[cut:]), torch.tensor(VALUES, dtype=torch.float64)
    assert moments.count == len(VALUES)
    assert moments.mean == pytest.approx(whole.mean().item(), abs=1e-14)
    assert moments.deviation == pytest.approx(whole.std(correction=0).item(), abs=1e-14)
    white = moments.whitened(whole)
    assert white.mean().item() == pytest.approx(0, abs=1e-14)
    assert white.std(correction=0).item() == pytest.approx(1, abs=1e-14)


def test_a_large_mean_costs_no_digits():
    values = [1e8 + value for value in VALUES]
    assert RunningMoments().with_values(values).deviation == pytest.approx(
        torch.tensor(VALUES, dtype=torch.float64).std(correction=0).item(), rel=1e-6
    )


@pytest.mark.parametrize("values", [[], [0.1], [0.1] * 7])
def test_numbers_that_are_all_equal_are_whitened_to_0(values):
    assert not RunningMoments().with_values(values).whitened(torch.tensor([0.1, 5.0])).any()
