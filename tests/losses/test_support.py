# SPDX-License-Identifier: Apache-2.0
"""Divergences over a support of likely tokens, and floors of the target: against distributions built by hand, against
autograd through the dense form, and what they must and must not see."""

import itertools
import math

import pytest
import torch
from divergences_by_hand import MIXTURE_WEIGHT, RULES, TEMPERATURE, draw, settings, term_and_slope
from loss_problem import Problem, assert_equal_runs

from trl_opsd.losses import (
    CLIPS,
    DIVERGENCES,
    REMAINDERS,
    SUPPORTS,
    BoundedShape,
    Divergence,
    OutputHead,
    Shape,
    Support,
    Target,
    dense_divergence_from_hidden,
    fused_divergence,
    token_divergence,
)

FORMS = list(itertools.product(SUPPORTS, REMAINDERS))
FLOORS = [{}, {"target_floor": 0.05}, {"relative_floor": 0.4}, {"target_floor": 0.02, "relative_floor": 0.7}]


def fused_on_logits(student, target, rule):
    """Value (n,) and gradient (n, V) of the fused loss on logits (n, V), which an identity head reads."""
    student = student.detach().requires_grad_()
    head = OutputHead(torch.eye(student.shape[-1], dtype=student.dtype))
    weights = torch.ones(len(student), dtype=student.dtype)
    loss, diagnostics = fused_divergence(student, head, Target(target), token_weights=weights, divergence=rule)
    return diagnostics.loss, torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize(("name", "clip"), RULES)
@pytest.mark.parametrize(("of", "remainder"), FORMS)
@pytest.mark.parametrize("k", [6, 9])
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence_exactly(name, clip, of, remainder, k):
    student, target, support = draw(4, 6), draw(4, 6, seed=1), Support(k, of, remainder)
    top = token_divergence(student, target, support=support, **settings(name, clip))
    assert torch.equal(top, token_divergence(student, target, **settings(name, clip)))
    rule = (name, MIXTURE_WEIGHT, TEMPERATURE, clip, 0.04)
    got, want = (fused_on_logits(student, target, Divergence(*rule, which)) for which in (support, None))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("of", "remainder"), FORMS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_support_equals_a_hand_built_distribution(name, of, remainder, k):
    student, target = draw(4, 6), draw(4, 6, seed=1)
    top = token_divergence(student, target, support=Support(k, of, remainder), **settings(name, None))
    q, p = (torch.softmax(logits / TEMPERATURE, -1) for logits in (student, target))
    for row in range(4):
        kept = set()
        for side, prob in (("student", q[row]), ("target", p[row])):
            if of in (side, "union"):
                kept |= set(sorted(range(6), key=lambda v: -prob[v])[:k])
        small = []
        for prob in (q[row].tolist(), p[row].tolist()):
            mass = sum(prob[v] for v in kept)
            entries = [prob[v] / (mass if remainder == "renormalise" else 1) for v in sorted(kept)]
            small.append(entries + ([1 - mass] if remainder == "tail" and len(kept) < 6 else []))
        want = sum(term_and_slope(name, *pair)[0] for pair in zip(*small, strict=True))
        assert top[row].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_the_gradient_of_the_dense_form_equals_finite_differences(name, remainder):
    target, support = draw(3, 6, seed=1), Support(2, "union", remainder)
    assert torch.autograd.gradcheck(
        lambda student: token_divergence(student, target, support=support, **settings(name, None)),
        draw(3, 6).requires_grad_(),
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("of", "remainder"), FORMS)
@pytest.mark.parametrize("k", [1, 4])
def test_fused_equals_dense_in_value_gradients_and_diagnostics(rule, of, remainder, k):
    for shape, variant in ((BoundedShape(2.0, 0.7), "all"), (Shape(), "softcap"), (Shape(), "bias")):
        problem = Problem(rule, shape, variant)
        problem.narrow(support=Support(k, of, remainder))
        dense = problem.run(dense_divergence_from_hidden)
        for tile_tokens in (2, None):
            assert_equal_runs(problem.run(fused_divergence, tile_tokens=tile_tokens), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("floors", FLOORS[1:], ids=str)
@pytest.mark.parametrize("support", [None, Support(3), Support(3, "union", "renormalise")], ids=str)
def test_fused_equals_dense_under_floors(rule, floors, support):
    problem = Problem(rule, Shape(), "all")
    problem.narrow(support=support, **floors)
    dense = problem.run(dense_divergence_from_hidden)
    assert_equal_runs(problem.run(fused_divergence), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("of", "remainder"), FORMS)
def test_float32_is_within_1e_5_of_float64_also_where_the_bucket_is_almost_empty(rule, of, remainder):
    student, target = 12 * draw(40, 30), 6 * draw(40, 30, seed=1)  # buckets of the student's down to exp(-100)
    divergence = Divergence(rule[0], 0.3, 1.0, rule[1], support=Support(4, of, remainder))
    narrow, wide = fused_on_logits(student.float(), target.float(), divergence), None
    wide = fused_on_logits(student.float().double(), target.float().double(), divergence)
    for got, want in zip(narrow, wide, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("of", "remainder"), FORMS)
def test_student_equal_to_target_has_loss_and_gradient_of_exactly_zero(rule, of, remainder):
    student = draw(20, 30).float()
    divergence = Divergence(rule[0], 0.3, 1.1, rule[1], support=Support(4, of, remainder), relative_floor=0.3)
    value, gradient = fused_on_logits(student, student, divergence)
    assert not value.any() and not gradient.any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_bucket_keeps_the_divergence_between_zero_and_the_full_one(name):
    student, target = draw(200, 9), draw(200, 9, seed=1)
    full = token_divergence(student, target, divergence=name)
    top = token_divergence(student, target, support=Support(3), divergence=name)
    assert (top > 0).all() and (top <= full + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_target_mass_moved_outside_the_set_changes_nothing_and_a_bucket_alone_sees_how_much_there_is(name, remainder):
    student, p = draw(1, 6), torch.softmax(draw(1, 6, seed=1), -1)
    outside = student.topk(3, largest=False).indices
    kept = p.scatter(-1, outside, 0.0)
    shuffled = kept + torch.zeros_like(p).scatter(-1, outside, p.gather(-1, outside).roll(1, -1))
    thinned = kept + torch.zeros_like(p).scatter(-1, outside, 0.25 * p.gather(-1, outside))
    rule = Divergence(name, support=Support(3, "student", remainder))
    results = [fused_on_logits(student, target.log(), rule) for target in (p, shuffled, thinned / thinned.sum())]
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    blind = torch.allclose(results[2][0], results[0][0], rtol=0, atol=1e-14)
    assert blind is (remainder == "renormalise")
    if remainder == "renormalise":
        assert not results[0][1].gather(-1, outside).any()


@pytest.mark.parametrize("epsilon", [0.2, 0.9])
def test_a_relative_floor_bounds_the_sampled_advantage(epsilon):
    """E[max(u, log eps) grad log S] is minus the gradient of KL(S || T floored at eps S)."""
    student, target = 2 * draw(5, 7), 2 * draw(5, 7, seed=1)
    _, got = fused_on_logits(student, target, Divergence("reverse_kl", relative_floor=epsilon))
    logits = student.requires_grad_()
    log_q, log_p = logits.log_softmax(-1), target.log_softmax(-1)
    advantage = (log_p - log_q).clamp(min=math.log(epsilon)).detach()
    assert (advantage == math.log(epsilon)).any()
    want = -torch.autograd.grad((log_q.exp().detach() * advantage * log_q).sum(), logits)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_a_tiny_floor_is_no_floor_and_an_absolute_one_makes_reverse_kl_finite():
    student, target = draw(4, 6), draw(4, 6, seed=1)
    plain = token_divergence(student, target, divergence="reverse_kl")
    for floor in ("target_floor", "relative_floor"):
        assert torch.equal(token_divergence(student, target, divergence="reverse_kl", **{floor: 1e-30}), plain)
    target[0, 0] = -torch.inf
    q = student[0].softmax(-1)
    want = (q * (q.log() - target[0].softmax(-1).clamp(min=1e-8).log())).sum()
    got = token_divergence(student, target, divergence="reverse_kl", target_floor=1e-8)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_support_leaves_the_entropies_and_the_agreement_those_of_the_whole_vocabulary(clip):
    problem = Problem(("jsd", clip), Shape())
    _, full = problem.call(fused_divergence)
    problem.narrow(support=Support(2))
    _, narrow = problem.call(fused_divergence)
    for field in ("student_entropy", "target_entropy", "top_agreement"):
        assert torch.equal(getattr(narrow, field), getattr(full, field))


@pytest.mark.parametrize(("field", "value"), [("k", 0), ("of", "teacher"), ("remainder", "drop")])
def test_a_setting_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}.* set "):
        Support(**{"k": 2, field: value})
