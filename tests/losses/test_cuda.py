# SPDX-License-Identifier: Apache-2.0
"""The losses as on a GPU: what they put where, in which dtype, and that they ask for no value (see `fake_cuda`)."""

import pytest
import torch
from fake_cuda import fake_cuda

from trl_opsd.losses import (
    CLIPS,
    DIVERGENCES,
    BoundedShape,
    Divergence,
    LinearShape,
    MixtureShape,
    OutputHead,
    Shape,
    Support,
    Target,
    fused_divergence,
    fused_fact_loss,
    projection,
    tiles,
)
from trl_opsd.losses.fact_loss import FactWork

SIZE, KEPT, WIDTH, VOCABULARY = 600, 550, 64, 1000
NARROW = (torch.bfloat16, torch.float32)
SHAPES = [Shape(), LinearShape(2.0), BoundedShape()]
RULES = [Divergence(name, clip=clip) for name in DIVERGENCES for clip in CLIPS]


def make(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="cuda", dtype=dtype)


class _Context:
    """What an autograd function keeps between its two passes, without autograd: that would ask for a GPU's streams."""

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


@pytest.fixture
def by_hand(monkeypatch):
    """Both passes run at once. Of the list the first entry says whether the head trains, before the call; after it the
    list holds the gradients of hidden states, weight and bias."""
    grads = []

    def apply(hidden, weight, bias, *others):
        context = _Context([True, grads[0], grads[0]])
        results = tiles.FusedDivergence.forward(context, hidden, weight, bias, others[0], True)
        grads[:] = tiles.FusedDivergence.backward(context, torch.ones_like(results[0]), None)[:3]
        return results

    monkeypatch.setattr(tiles.FusedDivergence, "apply", apply)
    with torch.no_grad():
        yield grads


def run(
    grads,
    rule=RULES[0],
    shape=SHAPES[0],
    *,
    dtype=torch.bfloat16,
    trained=True,
    own_head=False,
    positions=KEPT,
    loss=fused_divergence,
    extra=None,
    **logits,
):
    """Loss and diagnostics; `grads` gets the gradients."""
    grads[:] = [trained]

    def head():
        return OutputHead(make(VOCABULARY, WIDTH, dtype=dtype), make(VOCABULARY, dtype=dtype), **logits)

    anchor, direction = (make(SIZE, WIDTH, dtype=dtype) for _ in range(2))
    settings = extra or {}
    if loss is fused_divergence:
        settings = {"token_weights": make(SIZE, dtype=torch.float32), **settings}
    return loss(
        make(SIZE, WIDTH, dtype=dtype),
        head(),
        Target(anchor, direction if shape.uses_direction else None, shape, head() if own_head else None),
        divergence=rule,
        tile_tokens=256,
        positions=None if positions is None else torch.arange(positions, device="cuda"),
        **settings,
    )


def check(results, grads, dtype, trained=True):
    loss, stats = results
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert all(values.shape == (SIZE,) and values.dtype == torch.float32 for values in stats)
    of_head = [(VOCABULARY, WIDTH), (VOCABULARY,)] if trained else [None, None]
    assert [None if grad is None else (*grad.shape,) for grad in grads] == [(KEPT, WIDTH), *of_head]
    given = [grad for grad in grads if grad is not None]
    assert {tensor.device.type for tensor in (loss, *stats, *given)} == {"cuda"}
    assert {grad.dtype for grad in given} == {dtype}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.clip}")
def test_a_bfloat16_model_multiplies_narrow_and_adds_up_wide(by_hand, rule, shape):
    with fake_cuda() as products:
        check(run(by_hand, rule, shape, trained=False), by_hand, torch.bfloat16, trained=False)
    assert products == {NARROW}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_the_gradient_of_a_head_is_added_up_wide(by_hand, shape):
    with fake_cuda() as products:
        check(run(by_hand, shape=shape), by_hand, torch.bfloat16)
    assert products - {(torch.float32, torch.float32)} == {NARROW}  # the bias's sum is the other


def test_under_autocast_a_float32_model_multiplies_narrow(by_hand):
    with fake_cuda(autocast=torch.bfloat16) as products:
        check(run(by_hand, dtype=torch.float32, trained=False), by_hand, torch.float32, trained=False)
    assert products == {NARROW}


def test_under_autocast_the_head_is_narrowed_once_not_a_slice_at_a_time(by_hand, monkeypatch):
    calls, product = [], projection._product
    monkeypatch.setattr(projection, "WIDENED_ROWS", 100)
    monkeypatch.setattr(projection, "_product", lambda *args: (calls.append(args), product(*args)))
    with fake_cuda(autocast=torch.bfloat16):
        run(by_hand, dtype=torch.float32, trained=False)
    assert len(calls) == 3 * 3  # tiles of 256 positions; student, target, gradient


def test_without_autocast_a_float32_model_multiplies_wide(by_hand):
    with fake_cuda() as products:
        check(run(by_hand, dtype=torch.float32, trained=False), by_hand, torch.float32, trained=False)
    assert products == {(torch.float32, torch.float32)}


def test_capped_logits(by_hand):
    with fake_cuda() as products:
        check(run(by_hand, logit_softcap=30.0, trained=False), by_hand, torch.bfloat16, trained=False)
    assert products == {NARROW}


def test_a_target_with_a_head_of_its_own(by_hand):
    with fake_cuda():
        check(run(by_hand, own_head=True, logit_scale=0.5), by_hand, torch.bfloat16)


def test_positions_that_are_not_given_are_asked_for(by_hand):
    with fake_cuda(), pytest.raises(RuntimeError):
        run(by_hand, positions=None)


def columns():
    """Token ids and a column, for facts."""
    return {"token_ids": make(SIZE, dtype=torch.int64), "given": {"advantage": make(SIZE, dtype=torch.float32)}}


@pytest.mark.parametrize("support", [None, Support(20), Support(20, "union", "renormalise")], ids=str)
def test_a_weight_of_facts_and_a_support_ask_for_no_value(by_hand, support):
    rule = Divergence("jsd", clip="upper", support=support, target_floor=1e-8)
    with fake_cuda() as products:
        extra = columns() | {"weight_of": lambda facts: facts.given["advantage"] * facts.log_prob_ratio}
        check(run(by_hand, rule, MixtureShape(), trained=False, extra=extra), by_hand, torch.bfloat16, trained=False)
    assert products == {NARROW}


@pytest.mark.parametrize("trained", [False, True])
def test_the_sweeps_of_a_loss_of_facts_ask_for_no_value(by_hand, trained, monkeypatch):
    # Autograd would ask for a GPU's streams: numbers of the first sweep stand in for its derivatives.
    monkeypatch.setattr(
        FactWork, "differentiate", lambda work, stats, given, counted: (stats[0].sum(), stats[6], stats[1])
    )
    with fake_cuda() as products:
        results = run(by_hand, trained=trained, loss=fused_fact_loss, extra=columns() | {"loss_of": None})
        check(results, by_hand, torch.bfloat16, trained)
    assert products - {(torch.float32, torch.float32)} == {NARROW}


def test_a_tensor_on_another_device_is_refused():
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        torch.mm(make(2, 2), torch.empty(2, 2, dtype=torch.bfloat16))
