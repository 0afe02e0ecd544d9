# SPDX-License-Identifier: Apache-2.0
"""The geometric mix of two views: its formula, its limits and identity, and the fused form against both."""

import math

import pytest
import torch
from divergences_by_hand import draw
from loss_problem import RULES, H, N, Problem, V, assert_equal_runs

from trl_opsd.losses import (
    Divergence,
    MixtureShape,
    OutputHead,
    Shape,
    Support,
    Target,
    dense_divergence_from_hidden,
    fused_divergence,
    projection,
    token_divergence,
)

SHAPE = MixtureShape(0.4, 3.0)


def softmax(row):
    powers = [math.exp(z) for z in row]
    return [power / sum(powers) for power in powers]


def mix_by_hand(other, teacher, a_max, beta):
    """Probabilities of the target and the share a, from logits of one position."""
    s, t = softmax(other), softmax(teacher)
    d = sum(
        0.5 * x * math.log(2 * x / (x + y)) + 0.5 * y * math.log(2 * y / (x + y)) for x, y in zip(s, t, strict=True)
    )
    assert 0 <= d <= math.log(2)
    a = 2 * a_max * (1 / (1 + math.exp(-beta * d)) - 0.5)
    powers = [y ** (1 - a) * x**a for x, y in zip(s, t, strict=True)]
    return [power / sum(powers) for power in powers], a


def target_of(shape, other, teacher):
    return (teacher + shape(other - teacher, anchor_logits=teacher)).log_softmax(-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_target_and_share_equal_the_formula_entry_by_entry(scale):
    other, teacher = scale * draw(4, 5), scale * draw(4, 5, seed=1)
    target, share = target_of(SHAPE, other, teacher).exp(), SHAPE.share(other - teacher, teacher)
    for row in range(4):
        want, a = mix_by_hand(other[row].tolist(), teacher[row].tolist(), 0.4, 3.0)
        assert target[row].tolist() == pytest.approx(want, abs=1e-12)
        assert share[row].item() == pytest.approx(a, abs=1e-12)


def test_reverse_kl_to_the_mix_is_the_mix_of_reverse_kls():
    """KL(q || T^(1-a) S^a / Z) = (1 - a) KL(q || T) + a KL(q || S) + log Z, position by position."""
    student, other, teacher = (draw(6, 9, seed=seed) for seed in range(3))
    target, share = target_of(SHAPE, other, teacher), SHAPE.share(other - teacher, teacher).squeeze(-1)
    log_s, log_t = other.log_softmax(-1), teacher.log_softmax(-1)
    log_z = ((1 - share[:, None]) * log_t + share[:, None] * log_s).logsumexp(-1)
    whole, to_t, to_s = (token_divergence(student, x, divergence="reverse_kl") for x in (target, teacher, other))
    torch.testing.assert_close(whole, (1 - share) * to_t + share * to_s + log_z, rtol=0, atol=1e-12)


def test_the_share_is_0_for_equal_views_and_a_max_for_an_endless_sensitivity_and_never_more():
    other, teacher = draw(6, 9), draw(6, 9, seed=1)
    assert not SHAPE.share(torch.zeros_like(teacher), teacher).any()
    assert SHAPE.share(torch.full_like(teacher, 7.0), teacher).max() < 1e-30  # a constant is no disagreement
    endless = MixtureShape(0.4, 1e9).share(other - teacher, teacher)
    torch.testing.assert_close(endless, torch.full_like(endless, 0.4), rtol=0, atol=0)
    far = MixtureShape(1.0, 2.0).share(1000 * (other - teacher), 1000 * teacher)
    assert (far <= math.tanh(math.log(2)) + 1e-12).all()  # d <= log 2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_share_of_zero_is_the_plain_target(rule):
    mixed, plain = Problem(rule, MixtureShape(0.0), "all"), Problem(rule, Shape(), "all")
    assert_equal_runs(mixed.run(fused_divergence), plain.run(fused_divergence), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("variant", "support"), [("all", None), ("bias", Support(4))], ids=str)
def test_fused_equals_dense_in_value_gradients_and_diagnostics(rule, variant, support):
    problem = Problem(rule, SHAPE, variant)
    problem.narrow(support=support)
    dense = problem.run(dense_divergence_from_hidden)
    for tile_tokens in (2, None):
        assert_equal_runs(problem.run(fused_divergence, tile_tokens=tile_tokens), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_mixing_in_hidden_states_equals_mixing_of_logits(temperature):
    hidden, other, teacher = (draw(N, H, seed=seed) for seed in range(3))
    weight, bias = draw(V, H, seed=4), draw(V, seed=5)

    def logits(states):
        return (states @ weight.T + bias) / temperature

    want = token_divergence(logits(hidden), target_of(SHAPE, logits(other), logits(teacher)), divergence="reverse_kl")
    rule, target = Divergence("reverse_kl", temperature=temperature), Target(teacher, other - teacher, SHAPE)
    _, diagnostics = fused_divergence(
        hidden, OutputHead(weight, bias), target, token_weights=torch.ones(N), divergence=rule
    )
    torch.testing.assert_close(diagnostics.loss, want, rtol=0, atol=1e-12)


def test_a_view_costs_one_projection(monkeypatch):
    calls, product = [], projection._product
    monkeypatch.setattr(projection, "_product", lambda *args: (calls.append(args), product(*args)))
    with torch.no_grad():
        Problem(("reverse_kl", None), SHAPE).call(fused_divergence)
    assert len(calls) == 3  # the student, the anchor, the direction


def test_a_shape_of_somebodys_that_reads_the_direction_alone_works_as_before():
    class Halved:
        uses_direction = True

        def __call__(self, direction_logits):
            return direction_logits / 2

    problem = Problem(("jsd", None), Halved())
    assert_equal_runs(problem.run(fused_divergence), problem.run(dense_divergence_from_hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("field", "value"), [("a_max", -0.1), ("a_max", 1.5), ("sensitivity", 0.0)])
def test_a_setting_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}.* set "):
        MixtureShape(**{field: value})
