# SPDX-License-Identifier: Apache-2.0
"""Divergences over a support of likely tokens, and floors of the target: against distributions built by hand, against
autograd through the dense form, and what they must and must not see."""

import itertools
import math

import pytest
import torch
from divergences_by_hand import MIXTURE_WEIGHT, RULES, TEMPERATURE, draw, settings, term_and_slope
from loss_problem import TOKENS, Problem, assert_equal_runs

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
        sides = [set(sorted(range(6), key=lambda v: -prob[v])[:k]) for prob in (q[row], p[row])]
        kept = {"student": sides[0], "target": sides[1], "union": sides[0] | sides[1]}.get(of, sides[0] & sides[1])
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


def policy_gradient_by_hand(student, target, kept_of):
    """Value (n,) and gradient (n, V) of minus sum over kept k of r_k exp(log q_k - sg log q_k), r = sg[w (log p - log q)], by loops."""
    student = student.detach().requires_grad_()
    log_q, log_p = student.log_softmax(-1), target.log_softmax(-1)
    values = []
    for row in range(len(student)):
        kept = sorted(kept_of(log_q[row], log_p[row]))
        mass, value = sum(log_q[row, k].exp().item() for k in kept), torch.zeros((), dtype=student.dtype)
        for k in kept:
            reward = log_q[row, k].exp().item() / mass * (log_p[row, k] - log_q[row, k]).item()
            value = value - reward * (log_q[row, k] - log_q[row, k].item()).exp()
        values.append(value)
    values = torch.stack(values)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def likeliest(log, k):
    return set(sorted(range(len(log)), key=lambda v: -log[v].item())[:k])


SETS = {
    "student": lambda log_q, log_p: likeliest(log_q, 3),
    "target": lambda log_q, log_p: likeliest(log_p, 3),
    "union": lambda log_q, log_p: likeliest(log_q, 3) | likeliest(log_p, 3),
    "intersection": lambda log_q, log_p: likeliest(log_q, 3) & likeliest(log_p, 3),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("of", [*SUPPORTS, "sampled"])
@pytest.mark.parametrize("k", [1, 4])
def test_fused_equals_dense_for_token_rewards_over_every_set(clip, of, k):
    for shape, variant in ((BoundedShape(2.0, 0.7), "all"), (Shape(), "softcap"), (Shape(), "bias")):
        problem = Problem(("policy_reverse_kl", clip), shape, variant)
        problem.narrow(support=Support(k, of, "whole"))
        dense = problem.run(dense_divergence_from_hidden, token_ids=TOKENS)
        got = problem.run(fused_divergence, tile_tokens=2, token_ids=TOKENS)
        assert_equal_runs(got, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "policy_reverse_kl"])
def test_entries_that_make_no_distribution_have_no_divergence(name):
    with pytest.raises(ValueError, match=f"divergence='{name}' with remainder='whole'.*Set divergence='policy"):
        Divergence(name, support=Support(3, "student", "whole"))


@pytest.mark.parametrize("of", SETS)
def test_token_rewards_over_a_set_are_a_policy_gradient_with_the_students_share_of_the_set(of):
    student, target = draw(12, 9), draw(12, 9, seed=1)
    sizes = {len(SETS[of](q, p)) for q, p in zip(student.log_softmax(-1), target.log_softmax(-1), strict=True)}
    assert {"union": len(sizes) > 1, "intersection": 0 in sizes and 2 in sizes}.get(of, sizes == {3})
    got = fused_on_logits(student, target, Divergence("policy_reverse_kl", support=Support(3, of, "whole")))
    for ours, hand in zip(got, policy_gradient_by_hand(student, target, SETS[of]), strict=True):
        torch.testing.assert_close(ours, hand, rtol=0, atol=1e-13)


def test_token_rewards_over_the_whole_vocabulary_are_reverse_kl():
    """Identity 1, for k = V and the ratio 1."""
    student, target = 1.5 * draw(6, 7), draw(6, 7, seed=1)
    want = fused_on_logits(student, target, Divergence("reverse_kl"))
    for support in (None, Support(7, "union", "whole"), Support(9, "student", "whole")):
        got = fused_on_logits(student, target, Divergence("policy_reverse_kl", support=support))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_below_the_vocabulary_token_rewards_differ_from_renormalised_reverse_kl_by_what_leaks_outside(k):
    """The value is reverse KL of the renormalised sides plus the log-ratio of the masses; the gradient keeps the mass that
    renormalising would centre away: it pushes the whole set down where rewards are negative on average."""
    student, target = draw(50, 7), draw(50, 7, seed=1)
    log_q, log_p = student.log_softmax(-1), target.log_softmax(-1)
    kept = student.topk(k).indices
    mass_q, mass_p = (log.exp().gather(-1, kept).sum(-1) for log in (log_q, log_p))
    value, gradient = fused_on_logits(
        student, target, Divergence("policy_reverse_kl", support=Support(k, "student", "whole"))
    )
    renormalised = Divergence("reverse_kl", support=Support(k, "student", "renormalise"))
    centred_value, centred = fused_on_logits(student, target, renormalised)
    torch.testing.assert_close(value, centred_value + (mass_q / mass_p).log(), rtol=0, atol=1e-13)
    shares = torch.zeros_like(student).scatter(-1, kept, (log_q.gather(-1, kept)).softmax(-1))
    bias = value[:, None] * (shares - log_q.exp())
    torch.testing.assert_close(gradient, centred + bias, rtol=0, atol=1e-13)
    assert bias.abs().max() > 0.05 * centred.abs().max()


def test_the_sampled_token_alone_is_the_policy_gradient_with_the_log_ratio():
    student, target = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    tokens, rule = (
        torch.tensor([0, 6, 3, 3, 1]),
        Divergence("policy_reverse_kl", support=Support(1, "sampled", "whole")),
    )
    head, ones = OutputHead(torch.eye(7, dtype=torch.float64)), torch.ones(5, dtype=torch.float64)
    settings = {"token_weights": ones, "divergence": rule, "token_ids": tokens}
    log_q, log_p = student.log_softmax(-1), target.log_softmax(-1)
    ratio = (log_p - log_q).gather(-1, tokens[:, None]).squeeze(-1).detach()
    want = torch.autograd.grad(-(ratio * log_q.gather(-1, tokens[:, None]).squeeze(-1)).sum(), student)[0]
    for form in (fused_divergence, dense_divergence_from_hidden):
        loss, diagnostics = form(student, head, Target(target), **settings)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], want, rtol=0, atol=1e-14)
        torch.testing.assert_close(diagnostics.loss, -ratio, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="of='sampled' without token_ids"):
        fused_divergence(student, head, Target(target), token_weights=ones, divergence=rule)
