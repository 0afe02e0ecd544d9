# SPDX-License-Identifier: Apache-2.0
"""Formulas on the sampled token: their identities by enumeration of all tokens, their limits, and their shapes."""

import math

import pytest
import torch
from divergences_by_hand import draw

from trl_opsd.losses import (
    Support,
    bounded_square,
    brevity_reward,
    clipped_ratio,
    control_variate_advantage,
    entropy_direction,
    evidence_weight,
    floored_log_ratio,
    half_softplus,
    importance_weight,
    masked_mean,
    mixed_likelihood,
    preference_loss,
    relative_ratio,
    sampled_divergence,
    sequence_log_ratio,
    teacher_polarity,
    token_divergence,
)

RATIOS = torch.linspace(-30, 30, 601, dtype=torch.float64)


def enumerated(coefficient_of, rows=5, size=7):
    """Gradient (rows, size) to the student's logits of E[c(u) log q(y)] with c held constant, over all tokens, then the
    logits of student and target."""
    student, target = 1.5 * draw(rows, size).requires_grad_(), draw(rows, size, seed=1)
    log_q, log_p = student.log_softmax(-1), target.log_softmax(-1)
    coefficient = coefficient_of((log_p - log_q).detach(), log_q.detach(), log_p)
    expectation = (log_q.exp().detach() * coefficient * log_q).sum()
    return torch.autograd.grad(expectation, student)[0], student, target


def gradient_of(student, target, name, weight=0.5):
    value = token_divergence(student, target, divergence=name, mixture_weight=weight).sum()
    return torch.autograd.grad(value, student)[0]


def test_the_log_ratio_gives_the_gradient_of_reverse_kl():
    got, *logits = enumerated(lambda u, log_q, log_p: -u)
    torch.testing.assert_close(got, gradient_of(*logits, "reverse_kl"), rtol=0, atol=1e-14)


def test_half_softplus_gives_the_gradient_of_the_jensen_shannon_divergence():
    got, *logits = enumerated(lambda u, log_q, log_p: -half_softplus(u))
    torch.testing.assert_close(got, gradient_of(*logits, "jsd"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_the_log_ratio_to_a_mixture_gives_the_gradient_of_the_generalised_divergence(weight):
    def coefficient(u, log_q, log_p):
        mixture = weight * log_p.exp() + (1 - weight) * log_q.exp()
        return (1 - weight) * (log_q - mixture.log())

    got, *logits = enumerated(coefficient)
    torch.testing.assert_close(got, gradient_of(*logits, "jsd", weight), rtol=0, atol=1e-14)


def test_half_softplus_is_0_at_0_with_half_a_sigmoid_as_its_slope_and_bounded_below():
    ratios = RATIOS.clone().requires_grad_()
    value = half_softplus(ratios)
    (slope,) = torch.autograd.grad(value.sum(), ratios)
    torch.testing.assert_close(
        slope, torch.sigmoid(RATIOS) / 2, rtol=0, atol=1e-9
    )  # torch's softplus is linear from 20
    assert half_softplus(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(0.0, abs=1e-16)
    assert (value >= -math.log(2) / 2).all()


def test_the_bounded_square_pulls_most_at_1_216_and_fades_beyond():
    ratios = torch.linspace(-8, 8, 16001, dtype=torch.float64).requires_grad_()
    value = bounded_square(ratios)
    (slope,) = torch.autograd.grad(value.sum(), ratios)
    torch.testing.assert_close(slope, torch.sigmoid(-ratios.square() / 2) * ratios, rtol=0, atol=1e-14)
    assert (value >= 0).all() and (value <= math.log(2)).all() and value[8000].item() == pytest.approx(0.0, abs=1e-15)
    steepest = slope.abs().argmax()
    assert ratios[steepest].abs().item() == pytest.approx(1.216, abs=2e-3)
    assert slope[steepest].abs().item() == pytest.approx(0.393, abs=1e-3)
    assert slope.abs()[[0, -1]].max() < 1e-12


def test_a_pair_without_a_margin_costs_log_2_and_pulls_both_alike_and_a_swap_negates_the_margin():
    plus, minus, beta = torch.zeros(1).double().requires_grad_(), torch.zeros(1).double().requires_grad_(), 0.4
    loss = preference_loss(beta * (plus - minus))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    slopes = torch.autograd.grad(loss.sum(), (plus, minus))
    assert [slope.item() for slope in slopes] == pytest.approx([-beta / 2, beta / 2], abs=1e-15)
    margins = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(preference_loss(margins), -torch.sigmoid(margins).log(), rtol=0, atol=1e-14)
    torch.testing.assert_close(preference_loss(margins) - preference_loss(-margins), -margins, rtol=0, atol=1e-14)


def test_the_importance_weight_is_capped_and_a_constant():
    log_prob = torch.tensor([-1.0, -1.0, -1.0]).requires_grad_()
    weight = importance_weight(log_prob, torch.tensor([-1.0, -0.5, -5.0]))
    assert weight.tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0]) and not weight.requires_grad


ADVANTAGES = torch.tensor([1.3, -0.7, 0.0, 2.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bound", [0.0, 0.2, 1.0])
def test_the_evidence_weight_equals_its_formula_turns_no_sign_and_may_be_absent(strength, bound):
    ratio = torch.tensor([0.1, 0.1, 3.0, -0.05, -4.0], dtype=torch.float64)
    weight = evidence_weight(ratio, ADVANTAGES, bound=bound, strength=strength)
    for got, u, a in zip(weight.tolist(), ratio.tolist(), ADVANTAGES.tolist(), strict=True):
        sign = (a > 0) - (a < 0)
        evidence = min(max(math.exp(sign * u), 1 - bound), 1 + bound)
        assert got == pytest.approx(1 - strength + strength * evidence, abs=1e-15)
    assert (weight >= 0).all()
    if 0 in (strength, bound):
        assert torch.equal(weight, torch.ones_like(weight))
    no_evidence = evidence_weight(torch.zeros(5).double(), ADVANTAGES, bound=bound, strength=strength)
    assert torch.equal(no_evidence, torch.ones_like(no_evidence))


def test_swapping_student_and_teacher_turns_one_evidence_weight_into_the_other():
    u, bound = 0.5 * draw(5), 0.9
    swapped = evidence_weight(-u, ADVANTAGES, bound=bound)
    want = torch.exp(-torch.sign(ADVANTAGES) * u).clamp(1 - bound, 1 + bound)
    torch.testing.assert_close(swapped, want, rtol=0, atol=1e-15)


def test_the_control_variate_has_mean_zero_and_the_gradient_of_reverse_kl():
    student, target = 1.5 * draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    log_q, log_p = student.log_softmax(-1), target.log_softmax(-1)
    q, ratio = log_q.exp().detach(), (log_p - log_q).detach()
    reverse_kl = token_divergence(student, target, divergence="reverse_kl")
    advantage = control_variate_advantage(ratio, reverse_kl[:, None])
    assert not advantage.requires_grad
    torch.testing.assert_close((q * advantage).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-14)
    got = torch.autograd.grad(-(q * advantage * log_q).sum(), student)[0]
    torch.testing.assert_close(got, gradient_of(student, target, "reverse_kl"), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("scale", "shape", "lower"), [(0.3, (20, 50), True), (1.5, (5, 7), False)])
def test_the_control_variate_lowers_the_variance_where_no_token_dominates_but_not_always(scale, shape, lower):
    log_q, log_p = (scale * draw(*shape)).log_softmax(-1), draw(*shape, seed=1).log_softmax(-1)
    q, ratio = log_q.exp(), log_p - log_q

    def variance(coefficient):  # of the estimator -c (1[v = y] - q_v), summed over v
        slopes = coefficient[..., None] * (torch.eye(shape[-1]) - q[:, None, :])
        return (q[..., None] * slopes.square()).sum((1, 2)) - (q[..., None] * slopes).sum(1).square().sum(-1)

    advantage = control_variate_advantage(ratio, -(q * ratio).sum(-1, keepdim=True))
    assert (variance(advantage).sum() < variance(ratio).sum()).item() is lower


MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def test_a_relative_ratio_has_mean_magnitude_1_over_valid_tokens_and_survives_zeros():
    ratio = draw(3, 6).masked_fill(MASK == 0, math.nan)
    got = relative_ratio(ratio, MASK)
    assert not got[MASK == 0].any()
    for row in range(2):
        valid = MASK[row] != 0
        assert got[row][valid].abs().mean().item() == pytest.approx(1.0, abs=1e-15)
        assert torch.equal(got[row][valid].sign(), ratio[row][valid].sign())
    assert not relative_ratio(torch.zeros(3, 6), MASK).any()
    rounding = 1e-8 * ratio.nan_to_num()
    torch.testing.assert_close(relative_ratio(rounding, MASK), rounding.masked_fill(MASK == 0, 0.0) / 0.01)


def direction(entropy, ratio=None, quantile=0.2, mask=MASK):
    return entropy_direction(entropy, draw(3, 6, seed=9) if ratio is None else ratio, mask, quantile=quantile)


def test_the_entropy_direction_equals_its_formula_with_the_quantile_counted_from_below():
    entropy, ratio = draw(3, 6).abs(), draw(3, 6, seed=1)
    got = direction(entropy, ratio, 0.25)
    values = sorted(entropy[0, :5].tolist())
    threshold = values[1]  # a quarter of the way along five values
    mean = sum(values) / 5
    sigma = sum(abs(value - mean) for value in values) / 5
    for t in range(5):
        pull = math.tanh((threshold - entropy[0, t].item()) / sigma)
        want = pull / (1 + math.exp(1 - abs(ratio[0, t].item())))
        assert got[0, t].item() == pytest.approx(want, abs=1e-14)


def test_the_entropy_direction_pulls_all_at_quantile_1_pushes_all_at_0_and_most_at_a_fifth():
    entropy = draw(3, 6).abs()
    assert (direction(entropy, quantile=1.0) >= 0).all() and (direction(entropy, quantile=0.0) <= 0).all()
    entropy, mask = draw(1, 100).abs(), torch.ones(1, 100)
    pulled = direction(entropy, draw(1, 100, seed=1), mask=mask)[0] > 0
    assert pulled.sum() == 20 and entropy[0][pulled].max() < entropy[0][~pulled].min()


def test_the_entropy_direction_knows_no_scale_no_invalid_token_and_no_constant_entropy():
    entropy = draw(3, 6).abs()
    got = direction(entropy)
    torch.testing.assert_close(direction(7 * entropy), got, rtol=0, atol=1e-14)
    hostile = entropy.masked_fill(MASK == 0, math.inf)
    assert torch.equal(direction(hostile, draw(3, 6, seed=9).masked_fill(MASK == 0, math.nan)), got)
    assert not got[MASK == 0].any() and got.isfinite().all()
    for constant in (0.5, 0.3):
        assert not direction(torch.full((3, 6), constant, dtype=torch.float64)).any()


def test_the_weight_of_a_reference_is_the_geometric_mean_of_both_likelihoods():
    first, second = torch.tensor([0.5, 0.2]).double(), torch.tensor([0.125, 0.2]).double()
    weight = mixed_likelihood(first.log().requires_grad_(), second.log(), share=0.5)
    assert weight.tolist() == pytest.approx([0.25, 0.2]) and not weight.requires_grad
    for share, wanted in ((0.0, first), (1.0, second)):
        torch.testing.assert_close(mixed_likelihood(first.log(), second.log(), share=share), wanted)


def test_a_teacher_is_followed_fled_from_or_left_out_by_the_mean_of_its_bounded_ratio():
    ratio = torch.tensor([[[9.0, -1.0, 50.0], [-0.2, 0.1, 0.0]], [[-9.0, 1.0, 0.0], [0.4, 0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    # Means: (3 - 1) / 2 and -0.1 / 3; (-3 + 1) / 2 and 0.4 / 3.
    wanted = {(True, False): [[1.0, 0.0], [-1.0, -1.0]], (False, True): [[-1.0, 0.0], [1.0, 1.0]]}
    for right, signs in wanted.items():
        polarity = teacher_polarity(ratio, mask, torch.tensor(right), bound=3.0, threshold=0.05)
        assert polarity.tolist() == signs


def test_a_mean_over_no_token_is_0_and_what_is_masked_may_hold_anything():
    values = torch.tensor([[1.0, 3.0, torch.nan], [torch.inf, 0.0, 0.0]])
    assert masked_mean(values, torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [2.0, 0.0]


def test_a_shorter_right_rollout_has_more_reward_and_a_wrong_one_none():
    right, length = torch.tensor([True, True, True, False]), torch.tensor([0, 50, 100, 0])
    rewards = brevity_reward(right, length, longest=100, bonus=0.1)
    assert rewards.tolist() == pytest.approx([1.1, 1.05, 1.0, 0.0])


def test_the_logged_divergence_of_views_is_reverse_kl_in_expectation_over_the_students_tokens():
    log_q, log_p = draw(6).log_softmax(-1), draw(2, 6, seed=1).log_softmax(-1)
    weights = torch.tensor([[3.0], [-1.0]]).double().expand(2, 6)
    values = sampled_divergence(log_q, log_p, weights)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert (log_q.exp() * values).sum().item() == pytest.approx((0.75 * kl[0] + 0.25 * kl[1]).item())
    assert sampled_divergence(log_q, log_p, 0 * weights).tolist() == [0.0] * 6


@pytest.mark.parametrize("largest", [None, 3.0])
def test_the_clipped_ratio_gives_the_gradient_of_ppos_loss(largest):
    old, advantage = draw(400) - 2, draw(400, seed=1)
    log_prob = (old + 0.8 * draw(400, seed=2)).requires_grad_()
    ratio = torch.exp(log_prob - old)
    bounded = ratio if largest is None else ratio.clamp(max=largest)  # TRL's `delta`
    loss = -torch.minimum(bounded * advantage, ratio.clamp(0.8, 1.28) * advantage)
    (want,) = torch.autograd.grad(loss.sum(), log_prob)
    got = clipped_ratio(log_prob, old, advantage, low=0.2, high=0.28, largest=largest)
    torch.testing.assert_close(-advantage * got, want, rtol=0, atol=1e-14)
    assert not got.requires_grad and 0 < (got == 0).sum() < 300
    assert (ratio > 3).any() and (largest is None) == bool((got > 3).any())


def test_the_dual_clip_is_that_of_the_papers_that_bound_the_loss_below():
    """max(min(r A, clip(r) A), c A) for A < 0, as dual-clip PPO is written."""
    old, advantage = draw(400) - 2, -draw(400, seed=1).abs()
    log_prob = (old + 0.8 * draw(400, seed=2)).requires_grad_()
    ratio = torch.exp(log_prob - old)
    plain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    (want,) = torch.autograd.grad(-torch.maximum(plain, 3.0 * advantage).sum(), log_prob)
    got = clipped_ratio(log_prob, old, advantage, low=0.2, high=0.2, largest=3.0)
    torch.testing.assert_close(-advantage * got, want, rtol=0, atol=1e-14)


def test_an_old_policys_tokens_with_the_ratio_give_the_gradient_of_reverse_kl_to_the_policy_of_now():
    old = draw(5, 7, seed=2).log_softmax(-1)

    def weighed(u, log_q, log_p):  # `enumerated` weighs with q; tokens come from the old policy
        ratio = clipped_ratio(log_q, old, u, low=1e9, high=1e9)
        return -u * ratio * (old - log_q).exp()

    got, *logits = enumerated(weighed)
    torch.testing.assert_close(got, gradient_of(*logits, "reverse_kl"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [2, 4])
def test_a_control_variate_over_likely_tokens_alone_is_unbiased_but_has_another_mean(k):
    student, target = 1.5 * draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    log_q, log_p = student.log_softmax(-1), target.log_softmax(-1)
    support = Support(k, "student", "renormalise")
    baseline = token_divergence(student, target, divergence="reverse_kl", support=support).detach()
    q, advantage = log_q.exp().detach(), control_variate_advantage((log_p - log_q).detach(), baseline[:, None])
    got = torch.autograd.grad(-(q * advantage * log_q).sum(), student)[0]
    torch.testing.assert_close(got, gradient_of(student, target, "reverse_kl"), rtol=0, atol=1e-14)
    assert (q * advantage).sum(-1).abs().min() > 1e-3


def test_the_floor_of_the_log_ratio_is_the_log_odds_of_its_share():
    u = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(floored_log_ratio(u, share=0.1), u.clamp(min=math.log(1 / 9)), rtol=0, atol=1e-15)
    assert floored_log_ratio(u, share=0.5).min() == 0


def test_a_sequences_log_ratio_sums_the_tokens_that_count_whatever_stands_behind_them():
    log_prob = torch.tensor([[-1.0, -2.0, float("nan")], [-0.5, float("inf"), -4.0]], dtype=torch.float64)
    reference = torch.tensor([[-3.0, -0.5, 1.0], [-0.25, 2.0, -5.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert sequence_log_ratio(log_prob, reference, mask).tolist() == [2.0 - 1.5, -0.25 + 1.0]
    assert sequence_log_ratio(log_prob, 0.0, mask).tolist() == [-3.0, -4.5]
