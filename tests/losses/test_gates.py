# SPDX-License-Identifier: Apache-2.0
"""Gates: their formulas and limits, and the one that stays as it was between two bounds."""

import math
from statistics import fmean, median_low

import pytest
import torch
from divergences_by_hand import draw

from trl_opsd.losses import LatchedGate, entropy_gate, lookahead_minimum

MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def test_the_entropy_gate_lies_between_its_floor_and_1_and_knows_the_larger_of_a_nat_and_the_batch():
    entropy = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(entropy_gate(entropy, 2.0, strength=0.3), 1 - 0.3 * entropy / 2, rtol=0, atol=1e-15)
    torch.testing.assert_close(entropy_gate(entropy[:2], 0.5, strength=0.3), 1 - 0.3 * entropy[:2], rtol=0, atol=1e-15)
    assert torch.equal(entropy_gate(entropy, entropy.max(), strength=0.0), torch.ones_like(entropy))
    gate = entropy_gate(entropy, entropy.max(), strength=5.0)
    assert gate.tolist() == [1.0, 0.1, 0.1]
    assert (entropy_gate(entropy, entropy.max(), strength=0.9) >= 1 - 0.9 - 1e-15).all()


def test_the_lookahead_minimum_is_the_smallest_valid_value_ahead_and_gates_no_harder():
    entropy = draw(3, 6).abs().masked_fill(MASK == 0, math.nan)
    for window in (0, 2, 9):
        got = lookahead_minimum(entropy, MASK, window=window)
        for row in range(3):
            for t in range(6):
                ahead = [entropy[row, i].item() for i in range(t, min(t + window + 1, 6)) if MASK[row, i]]
                assert got[row, t].item() == (min(ahead) if MASK[row, t] else 0.0)
    valid = MASK != 0
    plain, cautious = (entropy_gate(h[valid], 2.0, strength=0.3) for h in (entropy, got))
    assert (cautious >= plain).all() and (cautious > plain).any()


@pytest.mark.parametrize("warmup_batches", [0, 1, 4])
def test_the_latched_gate_is_what_the_last_median_beyond_a_bound_made_it(warmup_batches):
    limits = {"warmup_batches": warmup_batches, "closes_below": 0.8, "opens_at": 1.1}
    batches = [draw(7 + index % 2, seed=index).abs() for index in range(40)]
    medians = [median_low(batch.tolist()) for batch in batches]
    gate, first = LatchedGate(), medians[:warmup_batches]
    for index, batch in enumerate(batches):
        gate = LatchedGate(**gate.after(batch, **limits)._asdict())
        seen = medians[warmup_batches : index + 1] if first else []
        beyond = [m / fmean(first) for m in seen if not 0.8 <= m / fmean(first) < 1.1]
        wanted = 1.0 if not beyond or beyond[-1] > 1 else 0.0
        assert gate.gate == wanted
        assert gate.ascends == (wanted if index >= warmup_batches else 0.0)
        assert gate.warmup == pytest.approx(medians[: min(index + 1, warmup_batches)], abs=1e-15)
    assert not first or {m / fmean(first) > 1.1 for m in medians} == {True, False}


def test_a_latched_gate_stays_open_where_the_first_batches_had_no_entropy():
    gate = LatchedGate([0.0, 0.0]).after(torch.tensor([0.5]), warmup_batches=2, closes_below=0.9, opens_at=1.0)
    assert gate == ([0.0, 0.0], 1.0, 1.0)
