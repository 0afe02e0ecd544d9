# SPDX-License-Identifier: Apache-2.0
"""Losses of facts: whole gradients against autograd through dense logits written out here, for the losses of the family."""

import dataclasses

import pytest
import torch
from loss_problem import (
    COLUMNS,
    GIVEN,
    RULES,
    SHAPES,
    TOKENS,
    VARIANTS,
    H,
    LargestTensor,
    N,
    Problem,
    V,
    assert_equal_runs,
    draw,
    fused,
    logits_of,
    ratio_of,
    surrogate,
    trace,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trl_opsd.losses import (
    Divergence,
    Facts,
    MixtureShape,
    OutputHead,
    Shape,
    Support,
    Target,
    bounded_square,
    dense_fact_loss,
    evidence_weight,
    fused_divergence,
    fused_fact_loss,
    half_softplus,
    preference_loss,
    projection,
    tiles,
    token_divergence,
)

GIVEN |= {"polarity": torch.tensor([1.0, -1.0, 1.0])[:, None].expand(3, N), "reference": draw(N, seed=22) - 2.5}


def anti_sd(facts):
    return -(facts.given["advantage"] - 0.5 * half_softplus(ratio_of(facts))) * facts.log_prob / N


def anti_sd_clipped(facts):
    return surrogate(facts, facts.given["advantage"] - 0.5 * half_softplus(ratio_of(facts))) / N


def sgsd(facts):
    return (facts.given["polarity"] * bounded_square(facts.given["views"] - 2 - facts.log_prob)).mean(0)


def pbsd(facts):
    ratio, pair = facts.log_prob - facts.given["reference"], facts.given["pair"]
    plus, minus = (ratio[pair == side].sum() for side in (0, 1))
    return preference_loss(0.3 * (plus - minus))


def rlsd(facts):
    return surrogate(
        facts, facts.given["advantage"] * evidence_weight(ratio_of(facts), facts.given["advantage"], bound=0.2)
    )


SAMPLED = [anti_sd, anti_sd_clipped, sgsd, pbsd, rlsd]


def crooked(facts):
    """Derivatives that depend on both, and on each other's positions."""
    return (facts.clipped_divergence.square() * facts.log_prob).sum() + facts.clipped_divergence.sum().tanh()


def only_divergence(facts):
    return facts.given["advantage"] * facts.clipped_divergence


WITH_DIVERGENCE = [trace, crooked, only_divergence]


def by_hand(problem, loss_of, target=True):
    """Loss and gradients by autograd through logits of all positions; a target without a direction."""
    logits, log_p = logits_of(problem)
    log_q, rule, rows = logits.log_softmax(-1), problem.settings["divergence"], torch.arange(N)
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    fields |= {"divergence": fields.pop("name"), "temperature": 1.0}
    del fields["entropy_top_k"]  # it changes no divergence
    plain, clipped = (token_divergence(logits, log_p, **{**fields, "clip": clip}) for clip in (None, rule.clip))
    entropies = [-(log.exp() * log).sum(-1).detach() for log in (log_q, log_p)]
    of_target = (log_p[rows, TOKENS], entropies[1], plain, clipped) if target else (None,) * 4
    facts = Facts(log_q[rows, TOKENS], of_target[0], entropies[0], *of_target[1:], GIVEN)
    loss = loss_of(facts).sum()
    return loss, torch.autograd.grad(1.7 * loss, problem.leaves)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_of", SAMPLED)
def test_a_loss_of_sampled_tokens_equals_autograd_through_dense_logits(loss_of, variant, target):
    problem = Problem(("reverse_kl", None), Shape(), variant)
    want = by_hand(problem, loss_of, target)
    for tile_tokens in (1, 3, None):
        got = fused(problem, loss_of, target, tile_tokens=tile_tokens)
        assert_equal_runs(got[:2], want, rtol=1e-12, atol=1e-12)
        assert_equal_runs(got, fused(problem, loss_of, target, form=dense_fact_loss), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "all", "softcap"])
@pytest.mark.parametrize("loss_of", WITH_DIVERGENCE)
def test_a_loss_of_the_divergence_too_equals_autograd_through_dense_logits(loss_of, variant, rule):
    problem = Problem(rule, Shape(), variant)
    want = by_hand(problem, loss_of)
    for tile_tokens in (2, None):
        assert_equal_runs(fused(problem, loss_of, tile_tokens=tile_tokens)[:2], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, MixtureShape(0.4, 3.0)], ids=str)
@pytest.mark.parametrize("support", [None, Support(3), Support(2, "union", "renormalise")], ids=str)
def test_fused_equals_dense_for_every_shape_and_support(rule, shape, support):
    problem = Problem(rule, shape, "all")
    problem.narrow(support=support)
    for loss_of in (trace, crooked):
        dense = fused(problem, loss_of, form=dense_fact_loss)
        assert_equal_runs(fused(problem, loss_of, tile_tokens=2), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_of", [sgsd, pbsd, only_divergence, crooked])  # those that detach nothing
def test_gradients_equal_finite_differences(loss_of):
    problem = Problem(("forward_kl", None), Shape(), "target head and bias")

    def loss(hidden, weight, bias):
        problem.hidden, problem.weight, problem.bias = hidden, weight, bias
        target = Target(problem.anchor, head=problem.target_head) if loss_of in WITH_DIVERGENCE else None
        return fused_fact_loss(
            hidden, OutputHead(weight, bias), target, token_ids=TOKENS, loss_of=loss_of, given=GIVEN
        )[0]

    assert torch.autograd.gradcheck(loss, problem.leaves)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_weighted_divergence_as_a_loss_of_facts_is_the_fused_divergence(rule):
    problem = Problem(rule, Shape(), "all")
    weights = problem.settings["token_weights"]
    want = problem.run(fused_divergence, token_ids=TOKENS)
    positions = weights.nonzero().squeeze(-1)
    got = fused(problem, lambda facts: weights * facts.clipped_divergence, positions=positions)
    assert_equal_runs(got[:2], want[:2], rtol=0, atol=1e-14)
    assert_equal_runs(got[2][:7], want[2][:7], rtol=0, atol=0)
    torch.testing.assert_close(got[2].weight, weights)


def test_a_policy_gradient_with_the_log_ratio_is_in_expectation_the_gradient_of_reverse_kl():
    """All tokens of one position, each weighted with its probability: identity 1."""
    problem = Problem(("reverse_kl", None), Shape(), "bias")
    hidden = problem.hidden[:1].detach().expand(V, H).contiguous().requires_grad_()
    anchor, head = problem.anchor[:1].expand(V, H), OutputHead(problem.weight.detach(), problem.bias.detach())
    q = head.logits(hidden[:1].detach()).softmax(-1).squeeze(0)
    settings = {"token_ids": torch.arange(V), "divergence": Divergence("reverse_kl")}

    def loss_of(facts):
        return -q * facts.log_prob_ratio.detach() * facts.log_prob

    loss, _ = fused_fact_loss(hidden, head, Target(anchor), loss_of=loss_of, **settings)
    got = torch.autograd.grad(loss, hidden)[0].sum(0)
    one = problem.hidden[:1].detach().requires_grad_()
    kl, _ = fused_divergence(
        one, head, Target(anchor[:1]), token_weights=torch.ones(1), divergence=Divergence("reverse_kl")
    )
    torch.testing.assert_close(got, torch.autograd.grad(kl, one)[0].squeeze(0), rtol=0, atol=1e-14)


def test_positions_that_do_not_count_may_hold_anything_and_their_terms_are_not_summed():
    problem = Problem(("jsd", None), Shape(), "bias")
    counts = torch.tensor([0, 1, 3, 6])
    whole = Problem(("jsd", None), Shape(), "bias")
    want = by_hand(whole, lambda facts: trace(facts)[counts])
    for states in (problem.hidden.data, problem.anchor):
        states[[2, 4, 5]] = torch.nan
    loss, gradients, diagnostics = fused(problem, trace, positions=counts)
    assert_equal_runs((loss, gradients), want, rtol=1e-12, atol=1e-12)
    assert not diagnostics.student_entropy[[2, 4, 5]].any() and diagnostics.student_entropy[counts].all()


def test_a_rank_without_positions_gets_a_connected_zero():
    problem = Problem(("jsd", None), Shape(), "bias")
    loss, gradients, diagnostics = fused(problem, anti_sd, positions=torch.tensor([], dtype=torch.long))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)
    assert not torch.stack(list(diagnostics)).any()


def test_a_loss_that_depends_on_nothing_has_gradients_of_zero():
    loss, gradients, _ = fused(Problem(("jsd", None), Shape()), lambda facts: facts.given["advantage"])
    torch.testing.assert_close(loss, COLUMNS["advantage"].sum())
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("loss_of", "target", "products"),
    [(anti_sd, False, 2), (anti_sd, True, 3), (trace, True, 4)],  # beside the gradient's
)
def test_the_target_is_projected_again_only_where_its_divergence_has_a_gradient(loss_of, target, products, monkeypatch):
    calls, product = [], projection._product
    monkeypatch.setattr(projection, "_product", lambda *args: (calls.append(args), product(*args)))
    fused(Problem(("jsd", None), Shape()), loss_of, target)
    assert len(calls) == products


def test_no_grad_gives_the_value_in_one_sweep(monkeypatch):
    problem = Problem(("jsd", None), Shape())
    want = fused(problem, trace)[0]
    monkeypatch.setattr(projection.Projection, "write_gradients", None)
    with torch.no_grad():
        loss, _ = fused_fact_loss(
            problem.hidden,
            OutputHead(problem.weight),
            Target(problem.anchor),
            token_ids=TOKENS,
            loss_of=trace,
            given=GIVEN,
            divergence=problem.settings["divergence"],
        )
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_is_left_out_of_the_gradients(frozen):
    problem = Problem(("jsd", None), Shape())
    want = dict(zip(("hidden", "weight"), fused(problem, trace)[1], strict=True))
    getattr(problem, frozen).requires_grad_(False)
    (trained,) = {"hidden", "weight"} - {frozen}
    problem.leaves = [getattr(problem, trained)]
    assert torch.equal(fused(problem, trace)[1][0], want[trained])


@pytest.mark.parametrize("loss_of", [anti_sd, trace])
def test_float32_is_within_1e_5_of_float64_and_bfloat16_costs_its_rounding(loss_of):
    want = fused(Problem(("jsd", None), Shape(), "all"), loss_of)
    got = fused(Problem(("jsd", None), Shape(), "all", torch.float32), loss_of)
    assert got[0].dtype == torch.float32
    assert_equal_runs(got, want, rtol=1e-5, atol=1e-5)
    narrow, wide = Problem(("jsd", None), Shape(), dtype=torch.bfloat16), Problem(("jsd", None), Shape())
    for field in ("hidden", "weight", "anchor"):
        getattr(wide, field).data.copy_(getattr(narrow, field).detach())
    _, gradients, _ = fused(narrow, loss_of)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    assert_equal_runs([g.double() for g in gradients], fused(wide, loss_of)[1], rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("loss_of", [anti_sd, trace])
def test_no_tensor_holds_the_logits_of_the_batch(loss_of, monkeypatch):
    size, width, vocabulary, tile = 64, 4, 100, 8
    hidden, weight = draw(size, width).requires_grad_(), draw(vocabulary, width, seed=1).requires_grad_()
    given = {"advantage": draw(size), "old_log_prob": draw(size), "pair": torch.arange(size) % 2}
    ids = torch.arange(size)
    with LargestTensor() as largest:
        loss, _ = fused_fact_loss(
            hidden,
            OutputHead(weight),
            Target(draw(size, width)),
            token_ids=ids,
            loss_of=loss_of,
            given=given,
            tile_tokens=tile,
        )
        loss.backward()
    assert 0 < largest.numel <= tile * vocabulary


def test_blocks_of_a_tile_change_nothing(monkeypatch):
    problem = Problem(("jsd", "upper"), MixtureShape(0.4, 3.0), "bias")
    want = fused(problem, trace)
    monkeypatch.setattr(tiles, "BLOCK_BYTES", {"cpu": 2 * V * 8})
    assert_equal_runs(fused(problem, trace, tile_tokens=5), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_of": lambda facts: facts.log_prob[:2]}, "loss_of gave shape"),
        ({"loss_of": lambda facts: facts.divergence}, "unclipped divergence under clip='upper'"),
        ({"token_ids": TOKENS[1:]}, "token_ids has shape"),
        ({"given": {"reward": draw(N + 1)}}, r"given\['reward'\] has shape"),
        ({"tile_tokens": 0}, "tile_tokens=0"),
        ({"num_tokens": V + 1}, f"num_tokens={V + 1}"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fused(Problem(("jsd", "upper"), Shape()), **{"loss_of": trace, **change})


def test_without_a_clip_both_names_of_the_divergence_carry_the_gradient():
    problem = Problem(("jsd", None), Shape())
    want = fused(problem, lambda facts: facts.clipped_divergence)
    assert_equal_runs(fused(problem, lambda facts: facts.divergence), want, rtol=0, atol=0)


def test_a_sharded_head_is_gathered_and_gets_a_sharded_gradient():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        problem = Problem(("jsd", None), Shape(), "num_tokens")
        want = fused(problem, trace)
        problem.weight = distribute_tensor(problem.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        problem.leaves[1] = problem.weight
        loss, gradients, _ = fused(problem, trace)
        torch.testing.assert_close(loss, want[0])
        torch.testing.assert_close(gradients[1].full_tensor(), want[1][1])
    finally:
        torch.distributed.destroy_process_group()


def test_under_autocast_nothing_changes():
    problem = Problem(("jsd", None), Shape(), "bias", torch.float32)
    want = fused(problem, trace)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_runs(fused(problem, trace), want, rtol=0, atol=0)


POINTWISE = [anti_sd, anti_sd_clipped, trace, only_divergence]


@pytest.mark.parametrize("rule", [("reverse_kl", None), ("jsd", "upper"), ("forward_kl", "token")], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, MixtureShape(0.4, 3.0)], ids=str)
@pytest.mark.parametrize("counted", [None, [0, 2, 3, 6]])
@pytest.mark.parametrize("loss_of", POINTWISE)
def test_a_loss_of_each_position_alone_is_the_same_tile_by_tile(loss_of, counted, shape, rule):
    problem, positions = Problem(rule, shape, "all"), None if counted is None else torch.tensor(counted)
    want = fused(problem, loss_of, positions=positions)
    for tile_tokens in (1, 3, None):
        got = fused(problem, loss_of, positions=positions, pointwise=True, tile_tokens=tile_tokens)
        assert_equal_runs(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_of", POINTWISE[:2])
def test_without_a_target_too(loss_of):
    problem = Problem(("reverse_kl", None), Shape(), "softcap")
    want = fused(problem, loss_of, False)
    assert_equal_runs(fused(problem, loss_of, False, pointwise=True, tile_tokens=2), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_of", "target", "products"),
    [(anti_sd, False, 1), (anti_sd, True, 2), (trace, True, 2)],  # beside the gradient's
)
def test_tile_by_tile_each_is_projected_once(loss_of, target, products, monkeypatch):
    calls, product = [], projection._product
    monkeypatch.setattr(projection, "_product", lambda *args: (calls.append(args), product(*args)))
    fused(Problem(("jsd", None), Shape()), loss_of, target, pointwise=True)
    assert len(calls) == products


def test_tile_by_tile_a_loss_that_is_no_term_a_position_is_refused():
    with pytest.raises(ValueError, match=r"gave shape \(\); give terms \(7,\)"):
        fused(Problem(("jsd", None), Shape()), pbsd, pointwise=True)


def test_tile_by_tile_a_rank_without_positions_gets_a_connected_zero():
    none = torch.tensor([], dtype=torch.long)
    loss, gradients, _ = fused(Problem(("jsd", None), Shape(), "bias"), anti_sd, positions=none, pointwise=True)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)
