# SPDX-License-Identifier: Apache-2.0
"""The fused loss against its dense twin, against the targets on logits, and in what it may not do."""

import dataclasses
from functools import partial

import pytest
import torch
from divergences_by_hand import DIFFERENTIATED
from loss_problem import CASES, RULES, SHAPES, H, LargestTensor, N, Problem, V, assert_equal_runs, draw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trl_opsd.losses import (
    DIVERGENCES,
    BoundedShape,
    Divergence,
    LinearShape,
    OutputHead,
    Shape,
    Target,
    dense_divergence_from_hidden,
    fused_divergence,
    projection,
    purified_logits,
    steered_logits,
    token_divergence,
)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("shape", "variant"), CASES, ids=str)
def test_fused_equals_dense_in_value_gradients_and_diagnostics(rule, shape, variant):
    problem = Problem(rule, shape, variant)
    dense = problem.run(dense_divergence_from_hidden)
    for tile_tokens in (1, 2, None):
        assert_equal_runs(problem.run(fused_divergence, tile_tokens=tile_tokens), dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_within_1e_5_of_float64(rule, shape):
    got = Problem(rule, shape, "all", torch.float32).run(fused_divergence)
    want = Problem(rule, shape, "all").run(dense_divergence_from_hidden)
    assert got[0].dtype == torch.float32
    assert_equal_runs(got, want, rtol=1e-5, atol=1e-5)


def forbid(problem, *fields):
    """Give two tokens of each bias no probability at all."""
    for field in fields:
        bias = problem.bias if field == "head_bias" else problem.target_head.bias
        bias.data[[3, 8]] = -torch.inf
    return problem


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("shape", "variant"), [case for case in CASES if case[1] in ("bias", "num_tokens", "softcap", "all")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_without_probability_leaves_fused_equal_to_dense(rule, shape, dtype, variant):
    fields = ("head_bias", "target_head_bias") if variant == "all" else ("head_bias",)
    problem = forbid(Problem(rule, shape, variant, dtype), *fields)
    dense = problem.run(dense_divergence_from_hidden)
    assert all(part.isfinite().all() for part in (dense[0], *dense[1], *dense[2]))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert_equal_runs(problem.run(fused_divergence, tile_tokens=2), dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("field", ["head_bias", "target_head_bias"])
def test_a_token_that_one_side_alone_cannot_have_gives_the_dense_value(rule, shape, field):
    problem = forbid(Problem(rule, shape, "target head and bias"), field)
    (loss, gradients, diagnostics), dense = (problem.run(f) for f in (fused_divergence, dense_divergence_from_hidden))
    torch.testing.assert_close((loss, diagnostics), (dense[0], dense[2]), rtol=0, atol=1e-9)
    sides = {"forward_kl": "head_bias", "reverse_kl": "target_head_bias", "policy_reverse_kl": "target_head_bias"}
    infinite = sides.get(rule[0]) == field
    assert diagnostics.unclipped[0].isinf() == infinite
    if all(gradient.isfinite().all() for gradient in dense[1]):
        torch.testing.assert_close(gradients, dense[1], rtol=0, atol=1e-9)
    else:
        assert infinite


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("widened_rows", [4, 8192])
def test_bfloat16_input_costs_only_the_rounding_of_its_gradients(rule, shape, widened_rows, monkeypatch):
    monkeypatch.setattr(projection, "WIDENED_ROWS", widened_rows)
    problem = Problem(rule, shape, dtype=torch.bfloat16)
    loss, gradients, _ = problem.run(fused_divergence)
    wide = Problem(rule, shape)
    for leaf, rounded in zip(wide.leaves, problem.leaves, strict=True):
        leaf.data.copy_(rounded.detach())
    wide.anchor = problem.anchor.double()
    wide.direction = None if problem.direction is None else problem.direction.double()
    want_loss, want_gradients, _ = wide.run(dense_divergence_from_hidden)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    assert_equal_runs([g.double() for g in gradients], want_gradients, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("rule", DIFFERENTIATED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [fused_divergence, dense_divergence_from_hidden])
def test_gradients_equal_finite_differences(rule, shape, form):
    problem = Problem(rule, shape, "target head and bias")

    def loss(hidden, weight, bias):
        problem.hidden, problem.weight, problem.bias = hidden, weight, bias
        return problem.call(form)[0]

    assert torch.autograd.gradcheck(loss, problem.leaves)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_steering_in_hidden_states_equals_steering_of_logits(name, temperature):
    hidden, weight, bias, base = draw(N, H), draw(V, H, seed=1), draw(V, seed=2), draw(N, H, seed=3)
    positive, negative = draw(3, N, H, seed=4), draw(2, N, H, seed=5)

    def logits(states):
        return states @ weight.T + bias

    target = steered_logits(logits(base), logits(positive), logits(negative), strength=1.5)
    want = token_divergence(logits(hidden), target, divergence=name, temperature=temperature)
    _, diagnostics = fused_divergence(
        hidden,
        OutputHead(weight, bias),
        Target(base, positive.mean(0) - negative.mean(0), LinearShape(1.5)),
        token_weights=torch.ones(N),
        divergence=Divergence(name, temperature=temperature),
    )
    torch.testing.assert_close(diagnostics.loss, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [None, 8])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_purifying_in_hidden_states_equals_purifying_of_logits(num_tokens, temperature):
    hidden, base, teacher, reference = (draw(N, H, seed=seed) for seed in range(4))
    weight, bias = draw(V, H, seed=4), draw(V, seed=5)

    def logits(states):
        return (states @ weight.T + bias) / temperature

    frozen = map(logits, (base, teacher, reference))
    target = purified_logits(*frozen, tanh_bound=2.0, conservativeness=0.7, num_tokens=num_tokens)
    want = token_divergence(logits(hidden)[:, :num_tokens], target[:, :num_tokens], divergence="jsd")
    _, diagnostics = fused_divergence(
        hidden,
        OutputHead(weight, bias),
        Target(base, teacher - reference, BoundedShape(2.0, 0.7)),
        token_weights=torch.ones(N),
        divergence=Divergence("jsd", temperature=temperature),
        num_tokens=num_tokens,
    )
    torch.testing.assert_close(diagnostics.loss, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_tokens", [3, None])
def test_student_equal_to_target_has_loss_and_gradients_of_exactly_zero(rule, dtype, tile_tokens):
    hidden, weight = (
        draw(50, 64, dtype=dtype).requires_grad_(),
        draw(513, 64, seed=1, dtype=dtype).requires_grad_(),
    )
    name, clip = rule
    loss, diagnostics = fused_divergence(
        hidden,
        OutputHead(weight),
        Target(hidden),
        token_weights=torch.ones(50),
        divergence=Divergence(name, 0.3, 1.1, clip),
        tile_tokens=tile_tokens,
    )
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()
    assert not diagnostics.unclipped.any() and diagnostics.top_agreement.all()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_no_weighted_position_gives_a_connected_zero(requires_grad):
    problem = Problem(("jsd", None), LinearShape(1.0), "bias")
    problem.settings["token_weights"] = torch.zeros(N)
    if requires_grad:
        loss, gradients, diagnostics = problem.run(fused_divergence)
        assert not any(gradient.any() for gradient in gradients)
        assert [g.shape for g in gradients] == [leaf.shape for leaf in problem.leaves]
    else:
        with torch.no_grad():
            loss, diagnostics = problem.call(fused_divergence)
    assert loss.item() == 0 and not torch.stack(list(diagnostics)).any()


def test_a_position_of_weight_zero_may_hold_anything():
    problem = Problem(("forward_kl", "upper"), LinearShape(1.0))
    clean = problem.run(fused_divergence)
    for states in (problem.hidden.data, problem.anchor, problem.direction):
        states[2] = torch.nan
    assert_equal_runs(problem.run(fused_divergence), clean, rtol=0, atol=0)


def test_frozen_views_and_target_head_get_no_gradient():
    problem = Problem(("forward_kl", None), LinearShape(1.0), "target head and bias")
    frozen = [problem.anchor, problem.direction, problem.target_head.weight]
    for tensor in frozen:
        tensor.requires_grad_()
    loss, _ = problem.call(fused_divergence)
    assert torch.autograd.grad(loss, frozen, allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_is_left_out_of_the_gradients(frozen):
    problem = Problem(("jsd", None), Shape())
    want = dict(zip(("hidden", "weight"), problem.run(fused_divergence)[1], strict=True))
    getattr(problem, frozen).requires_grad_(False)
    (trained,) = {"hidden", "weight"} - {frozen}
    problem.leaves = [getattr(problem, trained)]
    torch.testing.assert_close(problem.run(fused_divergence)[1][0], want[trained], rtol=0, atol=0)


def test_no_grad_gives_the_value_without_gradient_products(monkeypatch):
    problem = Problem(("forward_kl", "upper"), BoundedShape(), "bias")
    want = problem.run(fused_divergence)[0]
    monkeypatch.setattr(projection.Projection, "write_gradients", None)
    with torch.no_grad():
        loss, diagnostics = problem.call(fused_divergence)
    assert not loss.requires_grad and not diagnostics.loss.requires_grad
    assert loss.item() == want.item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_was_in_memory_before_the_gradients_means_nothing(monkeypatch, dtype):
    monkeypatch.setattr(projection, "WIDENED_ROWS", 7)  # a bfloat16 head is widened in slices
    problem = Problem(("jsd", None), BoundedShape(), "bias", dtype)
    want = problem.run(fused_divergence, tile_tokens=2)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    loss, grads, _ = problem.run(fused_divergence, tile_tokens=2)
    torch.testing.assert_close(loss, want[0], rtol=0, atol=0)
    torch.testing.assert_close(grads, want[1], rtol=0, atol=0)


def test_autocast_changes_nothing():
    problem = Problem(("jsd", None), BoundedShape(), "bias", torch.float32)
    want = problem.run(fused_divergence)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.run(fused_divergence)
    assert_equal_runs(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trains_head", [True, False])
def test_no_tensor_holds_the_logits_of_the_batch(name, shape, trains_head):
    size, width, vocabulary, tile = 64, 4, 100, 8
    hidden, weight = (
        draw(size, width).requires_grad_(),
        draw(vocabulary, width, seed=1).requires_grad_(trains_head),
    )
    direction = draw(size, width, seed=3) if shape.uses_direction else None
    with LargestTensor() as largest:
        loss, _ = fused_divergence(
            hidden,
            OutputHead(weight),
            Target(draw(size, width, seed=2), direction, shape),
            token_weights=torch.ones(size),
            divergence=Divergence(name),
            tile_tokens=tile,
        )
        loss.backward()
    assert 0 < largest.numel <= max(tile * vocabulary, vocabulary * width)


def test_a_single_backward_makes_no_second_gradient_of_the_head():
    size, vocabulary, width = 4, 512, 64
    hidden, weight = (draw(rows, width).requires_grad_() for rows in (size, vocabulary))
    settings = {"token_weights": torch.ones(size), "divergence": Divergence("forward_kl")}
    call = partial(fused_divergence, hidden, OutputHead(weight), Target(draw(size, width, seed=2)), **settings)
    loss, _ = call()
    with LargestTensor() as made:
        (2.0 * loss).backward()
    assert set(made.makers.get(vocabulary * width, [])) <= {"detach.default"}
    again, _ = call()
    wanted = torch.autograd.grad(2.0 * again, (hidden, weight), retain_graph=True)
    torch.testing.assert_close((hidden.grad, weight.grad), wanted, rtol=0, atol=0)


def test_the_backward_may_run_twice():
    problem = Problem(("jsd", None), Shape())
    loss, _ = problem.call(fused_divergence)
    first = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
    assert_equal_runs(torch.autograd.grad(loss, problem.leaves), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": draw(N + 1, H)}, "student_hidden has shape"),
        ({"hidden": draw(1, N, H)}, "student_hidden has shape"),
        ({"anchor": draw(N, H + 1)}, "direction has shape .* and anchor"),
        ({"anchor": draw(N + 1, H), "direction": draw(N + 1, H)}, "target.anchor has shape"),
        ({"direction": draw(N - 1, H)}, "direction has shape"),
        ({"direction": None}, "direction is None"),
        ({"shape": Shape()}, "direction is given"),
        ({"logits": {"logit_softcap": 3.0}}, "logit_softcap=3.0.*not linear"),
        ({"logits": {"logit_softcap": 0.0}}, "logit_softcap=0.0"),
        ({"num_tokens": V + 1}, f"num_tokens={V + 1}"),
        ({"tile_tokens": 0}, "tile_tokens=0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    problem = Problem(("forward_kl", None), LinearShape(1.0))
    for field in ("hidden", "anchor", "direction", "shape", "logits"):
        setattr(problem, field, change.pop(field, getattr(problem, field)))
    with pytest.raises(ValueError, match=message):
        problem.run(fused_divergence, **change)


def test_a_sharded_head_is_gathered_and_gets_a_sharded_gradient():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        problem = Problem(("jsd", None), Shape(), "num_tokens")
        want = problem.run(fused_divergence)
        problem.weight = distribute_tensor(problem.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        problem.leaves[1] = problem.weight
        loss, gradients, _ = problem.run(fused_divergence)
        torch.testing.assert_close(loss, want[0])
        torch.testing.assert_close(gradients[1].full_tensor(), want[1][1])
    finally:
        torch.distributed.destroy_process_group()


def test_the_divergence_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Divergence().clip = "upper"
