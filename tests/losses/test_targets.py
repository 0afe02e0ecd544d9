# SPDX-License-Identifier: Apache-2.0
"""Targets against their formulas written out entry by entry, and token weights."""

import math

import pytest
import torch

from trl_opsd.losses import BoundedShape, LinearShape, purified_logits, steered_logits, token_weights, weighted_sum


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def test_steered_logits_equal_the_formula_entry_by_entry():
    base, positive, negative = draw(2, 3), draw(4, 2, 3, seed=1), draw(1, 2, 3, seed=2)
    target = steered_logits(base, positive, negative, strength=1.7)
    for row in range(2):
        for v in range(3):
            right = sum(positive[g, row, v].item() for g in range(4)) / 4
            want = base[row, v].item() + 1.7 * (right - negative[0, row, v].item())
            assert target[row, v].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("num_tokens", [None, 5, 3])
def test_purified_logits_equal_the_formula_entry_by_entry(num_tokens):
    views = draw(2, 5), draw(2, 5, seed=1) * 3, draw(2, 5, seed=2)
    bound, beta, count = 1.5, 0.8, num_tokens or 5
    target = purified_logits(*views, tanh_bound=bound, conservativeness=beta, num_tokens=num_tokens)
    for row in range(2):
        logs = []
        for view in views:
            powers = [math.exp(z) for z in view[row, :count].tolist()]
            logs.append([math.log(power / sum(powers)) for power in powers])
        base, teacher, reference = logs
        ratio = [t - r for t, r in zip(teacher, reference, strict=True)]
        mean = sum(ratio) / count
        shifted = [b + bound * math.tanh((d - mean) / bound) / beta for b, d in zip(base, ratio, strict=True)]
        total = sum(math.exp(z) for z in shifted)
        want = [math.exp(z) / total for z in shifted] + [0.0] * (5 - count)
        assert target[row].softmax(-1).tolist() == pytest.approx(want, abs=1e-12)
    assert (target[:, count:] == -torch.inf).all()


def test_equal_views_leave_the_base_distribution():
    base, view = draw(3, 5), draw(3, 5, seed=1)
    torch.testing.assert_close(purified_logits(base, view, view), base.log_softmax(-1))
    pool = view.expand(4, 3, 5)
    assert torch.equal(steered_logits(base, pool, pool, strength=3.0), base)
    assert torch.equal(steered_logits(base, pool, -pool, strength=0.0), base)


def test_targets_are_detached_and_at_least_float32():
    base = draw(2, 5).bfloat16().requires_grad_()
    for target in (
        steered_logits(base, base[None], base[None], strength=1.0),
        purified_logits(base, base, base),
    ):
        assert target.dtype == torch.float32 and not target.requires_grad


def test_bounded_shape_ignores_a_constant_and_stays_within_its_bound():
    direction = draw(4, 9) * 100
    shape = BoundedShape(tanh_bound=3.0, conservativeness=2.0)
    torch.testing.assert_close(shape(direction), shape(direction + 50.0))
    assert shape(direction).abs().max() <= 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearShape(-1.0), "strength=-1.0"),
        (lambda: LinearShape(math.nan), "strength=nan"),
        (lambda: BoundedShape(tanh_bound=0.0), "tanh_bound=0.0"),
        (lambda: BoundedShape(conservativeness=-2.0), "conservativeness=-2.0"),
        (lambda: steered_logits(draw(2, 3), draw(1, 2, 3), draw(1, 2, 3), strength=-1.0), "strength=-1.0"),
        (lambda: steered_logits(draw(2, 3), draw(0, 2, 3), draw(1, 2, 3), strength=1.0), "positive_logits"),
        (lambda: steered_logits(draw(2, 3), draw(1, 2, 3), draw(2, 3), strength=1.0), "negative_logits"),
        (lambda: purified_logits(draw(2, 3), draw(2, 4), draw(2, 3)), "teacher_logits has shape"),
        (lambda: purified_logits(draw(2, 3), draw(2, 3), draw(3)), "reference_logits has shape"),
        (lambda: purified_logits(draw(2, 3), draw(2, 3), draw(2, 3), num_tokens=4), "num_tokens=4"),
        (lambda: purified_logits(draw(2, 3), draw(2, 3), draw(2, 3), num_tokens=0), "num_tokens=0"),
        (lambda: token_weights(torch.ones(1, 2), reduction="mean"), "reduction='mean'"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_token_weights_give_the_mean_over_tokens_or_over_sequence_means():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    values = torch.tensor([[1.0, 2.0, 3.0, 9.0], [8.0, 9.0, 9.0, 9.0], [9.0] * 4])
    by_token = token_weights(mask, denominator=mask.sum())
    by_sequence = token_weights(mask, reduction="sequence", denominator=2.0)
    assert weighted_sum(values, by_token).item() == pytest.approx((1 + 2 + 3 + 8) / 4)
    assert weighted_sum(values, by_sequence).item() == pytest.approx((2 + 8) / 2)
    assert not by_token[mask == 0].any() and not by_sequence[mask == 0].any()


def test_a_value_at_weight_zero_counts_nothing_even_if_it_is_not_a_number():
    assert weighted_sum(torch.tensor([2.0, math.nan]), torch.tensor([0.5, 0.0])).item() == 1.0


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_one_batch_equals_its_micro_batches_under_a_global_denominator(reduction):
    mask, values = (draw(4, 6) > 0).float(), draw(4, 6, seed=1)
    whole = weighted_sum(values, token_weights(mask, reduction=reduction, denominator=7.0))
    parts = [
        weighted_sum(values[rows], token_weights(mask[rows], reduction=reduction, denominator=7.0))
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(whole, sum(parts))
