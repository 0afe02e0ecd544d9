# SPDX-License-Identifier: Apache-2.0
"""Facts of the sweep, and weights made of them: against numbers from dense logits, and in what they may not change."""

import dataclasses
import math

import pytest
import torch
from loss_problem import (
    COLUMNS,
    RULES,
    SHAPES,
    TOKENS,
    VARIANTS,
    N,
    Problem,
    V,
    assert_equal_runs,
    draw,
    logits_of,
    signed,
)

from trl_opsd.losses import (
    MixtureShape,
    Shape,
    Support,
    dense_divergence_from_hidden,
    fused_divergence,
    projection,
    token_divergence,
    token_weights,
    weighted_sum,
)


def facts_by_hand(problem):
    """log q(y), log p(y), both entropies, and the divergence before and after the clip, from dense logits."""
    logits, log_p = logits_of(problem)
    log_q, rule = logits.log_softmax(-1), problem.settings["divergence"]
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    fields |= {"divergence": fields.pop("name"), "temperature": 1.0}
    del fields["entropy_top_k"]  # it changes no divergence
    values = [token_divergence(logits, log_p, **{**fields, "clip": clip}) for clip in (None, rule.clip)]
    sampled = [log[torch.arange(N), TOKENS] for log in (log_q, log_p)]
    return *sampled, *(-(log.exp() * log).sum(-1) for log in (log_q, log_p)), *values


def seen_facts(problem, **extra):
    """The facts that a weight function saw, at the positions that have weight."""
    seen = []
    problem.run(
        fused_divergence, weight_of=lambda facts: (seen.append(facts), torch.ones_like(facts.log_prob))[1], **extra
    )
    names = "log_prob", "target_log_prob", "student_entropy", "target_entropy", "divergence", "clipped_divergence"
    return [torch.cat([getattr(facts, name) for facts in seen]) for name in names], seen


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "all", "softcap"])
@pytest.mark.parametrize("support", [None, Support(3), Support(2, "union", "renormalise")], ids=str)
def test_facts_are_those_of_dense_logits_under_clip_support_temperature_and_softcap(rule, variant, support):
    problem = Problem(rule, Shape(), variant)
    problem.narrow(support=support)
    kept = problem.settings["token_weights"] != 0
    got, seen = seen_facts(problem, token_ids=TOKENS, given=COLUMNS, tile_tokens=2)
    for fact, want in zip(got, facts_by_hand(problem), strict=True):
        torch.testing.assert_close(fact, want.detach()[kept], rtol=0, atol=1e-12)
    assert [len(facts.log_prob) for facts in seen] == [2, 2, 1]
    for name, column in COLUMNS.items():
        parts = [facts.given[name] for facts in seen]
        assert torch.equal(
            parts[0] if column.ndim == 0 else torch.cat(parts, -1), column[..., kept] if column.ndim else column
        )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_of_facts_is_a_constant_factor_of_the_dense_loss(rule, variant):
    """By hand: autograd through sum of sg(weight) times the divergence, from dense logits."""
    problem = Problem(rule, Shape(), variant)
    loss, gradients, diagnostics = problem.run(fused_divergence, token_ids=TOKENS, given=COLUMNS, weight_of=signed)
    names = "log_prob", "target_log_prob", "student_entropy", "target_entropy", "divergence", "clipped_divergence"
    by_hand = facts_by_hand(problem)
    facts = type("Facts", (), dict(zip(names, (x.detach() for x in by_hand), strict=True)) | {"given": COLUMNS})
    facts.log_prob_ratio = facts.target_log_prob - facts.log_prob
    weight, kept = signed(facts), problem.settings["token_weights"] != 0
    assert (weight[kept] > 0).any() and (weight[kept] < 0).any()
    want = (problem.settings["token_weights"] * weight * by_hand[-1]).sum()
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)
    for got, gradient in zip(gradients, torch.autograd.grad(1.7 * want, problem.leaves), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(diagnostics.weight, weight * kept, rtol=0, atol=1e-12)
    torch.testing.assert_close(diagnostics.log_prob_ratio, facts.log_prob_ratio * kept, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, MixtureShape(0.4, 3.0)], ids=str)
@pytest.mark.parametrize("support", [None, Support(3)], ids=str)
def test_fused_equals_dense_with_a_weight_of_facts_for_every_shape(rule, shape, support):
    problem = Problem(rule, shape, "all")
    problem.narrow(support=support)
    extra = {"token_ids": TOKENS, "given": COLUMNS, "weight_of": signed}
    dense = problem.run(dense_divergence_from_hidden, **extra)
    for tile_tokens in (1, 2, None):
        assert_equal_runs(problem.run(fused_divergence, tile_tokens=tile_tokens, **extra), dense, rtol=0, atol=1e-12)


def test_token_ids_and_a_weight_of_1_change_neither_loss_nor_gradients_and_add_no_product(monkeypatch):
    problem = Problem(("forward_kl", "upper"), Shape(), "all")
    plain = problem.run(fused_divergence)
    calls, product = [], projection._product
    monkeypatch.setattr(projection, "_product", lambda *args: (calls.append(args), product(*args)))
    loss, gradients, diagnostics = problem.run(
        fused_divergence, token_ids=TOKENS, weight_of=lambda facts: torch.ones_like(facts.log_prob)
    )
    assert len(calls) == 2  # the student and the target; gradients are added up elsewhere
    assert torch.equal(loss, plain[0]) and all(map(torch.equal, gradients, plain[1]))
    assert all(map(torch.equal, diagnostics[:6], plain[2][:6]))
    assert not plain[2].log_prob_ratio.any() and torch.equal(plain[2].weight, (plain[2].loss != 0).double())


def test_a_weight_of_facts_without_token_ids_sees_no_sampled_token():
    problem, seen = Problem(("jsd", None), Shape()), []
    problem.run(fused_divergence, weight_of=lambda facts: (seen.append(facts), 1 / (1 + facts.target_entropy))[1])
    assert seen[0].log_prob is None and seen[0].target_log_prob is None


def test_a_negative_weight_ascends_and_a_weight_of_zero_leaves_an_infinite_divergence_out():
    problem = Problem(("forward_kl", None), Shape(), "bias")
    down = problem.run(fused_divergence)
    up = problem.run(fused_divergence, weight_of=lambda facts: -torch.ones_like(facts.divergence))
    assert_equal_runs((-up[0], [-gradient for gradient in up[1]]), down[:2], rtol=0, atol=0)
    problem = Problem(("forward_kl", None), Shape(), "target head and bias")
    problem.bias.data[3] = -torch.inf
    loss, gradients, _ = problem.run(fused_divergence, weight_of=lambda facts: torch.zeros_like(facts.divergence))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_no_gradient_goes_through_the_weight_or_the_columns():
    problem, column = Problem(("jsd", None), Shape()), draw(N).requires_grad_()
    loss, _ = problem.call(fused_divergence, given={"c": column}, weight_of=lambda facts: facts.given["c"] * 2)
    assert torch.autograd.grad(loss, column, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"token_ids": TOKENS[:-1]}, "token_ids has shape"),
        ({"token_ids": TOKENS[None]}, "token_ids has shape"),
        ({"given": {"reward": draw(N + 1)}}, r"given\['reward'\] has shape"),
        ({"given": {"reward": draw(1, 1, N)}}, r"given\['reward'\] has shape"),
        ({"weight_of": lambda facts: facts.divergence.mean()}, "weight_of gave shape"),
    ],
)
def test_columns_and_weights_that_do_not_fit_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        Problem(("jsd", None), Shape()).call(fused_divergence, **extra)


def test_what_token_ids_and_columns_hold_at_a_position_of_weight_zero_means_nothing():
    problem = Problem(("jsd", None), Shape())
    want = problem.run(fused_divergence, token_ids=TOKENS, given=COLUMNS, weight_of=signed)
    unused = problem.settings["token_weights"] == 0
    columns = {"largest": COLUMNS["largest"]}
    columns |= {name: COLUMNS[name].masked_fill(unused, math.nan) for name in ("advantage", "views")}
    ids = TOKENS.masked_fill(unused, V + 5)
    assert_equal_runs(
        problem.run(fused_divergence, token_ids=ids, given=columns, weight_of=signed), want, rtol=0, atol=0
    )


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_real_token_weights_multiply_shares_that_the_mask_alone_decides(reduction):
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    weights = torch.tensor([[0.5, -2.0, math.nan, 0.0], [9.0, 0.25, 9.0, 9.0], [1.0] * 4])
    plain = token_weights(mask, reduction=reduction, denominator=2.0)
    real = token_weights(mask, weights=weights, reduction=reduction, denominator=2.0)
    assert real.dtype == torch.float32
    assert torch.equal(real, plain * weights.nan_to_num(0.0))
    by_row = token_weights(mask, weights=torch.tensor([[2.0], [-1.0], [5.0]]), reduction=reduction, denominator=2.0)
    assert torch.equal(by_row, plain * torch.tensor([[2.0], [-1.0], [5.0]]))
    values = draw(3, 4)
    want = sum(
        (values[i, j] * weights[i, j] / (mask[i].sum() if reduction == "sequence" else 1) / 2).item()
        for i in range(3)
        for j in range(4)
        if mask[i, j]
    )
    assert weighted_sum(values, real).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, V, V + 5])
@pytest.mark.parametrize("form", [fused_divergence, dense_divergence_from_hidden])
def test_the_entropy_of_the_targets_likeliest_tokens_is_a_fact_on_request(k, form):
    problem, seen = Problem(("reverse_kl", None), Shape(), "plain"), []
    rule = dataclasses.replace(problem.settings["divergence"], entropy_top_k=k)
    problem.settings["divergence"] = rule
    problem.run(
        form, weight_of=lambda facts: (seen.append(facts), torch.ones_like(facts.log_prob))[1], token_ids=TOKENS
    )
    got = torch.cat([facts.target_top_entropy for facts in seen])
    wanted = []
    for log_p in logits_of(problem)[1]:
        kept = sorted(log_p.exp().tolist(), reverse=True)[:k]
        wanted.append(-sum(p / sum(kept) * math.log(p / sum(kept)) for p in kept))
    wanted = torch.tensor(wanted, dtype=got.dtype)
    if len(got) < N:  # the fused loss leaves positions of weight 0 out
        wanted = wanted[problem.settings["token_weights"] != 0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_asking_for_that_entropy_changes_neither_loss_nor_gradients():
    problem = Problem(("forward_kl", "upper"), Shape(), "plain")
    runs = []
    for k in (None, 2):
        problem.settings["divergence"] = dataclasses.replace(problem.settings["divergence"], entropy_top_k=k)
        runs.append(problem.run(fused_divergence, weight_of=lambda facts: 1 + facts.student_entropy, token_ids=TOKENS))
    assert_equal_runs(*runs, rtol=0, atol=0)
    with pytest.raises(ValueError, match="entropy_top_k=0 keeps no token"):
        dataclasses.replace(problem.settings["divergence"], entropy_top_k=0)
