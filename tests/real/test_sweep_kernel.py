# SPDX-License-Identifier: Apache-2.0
"""The sweep as a Triton kernel, in Triton's interpreter, against the dense loss in float64 and the plain sweep."""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from divergences_by_hand import CLIP_VALUE, MIXTURE_WEIGHT, RULES, TEMPERATURE, draw, settings
from loss_problem import COLUMNS, TOKENS, Problem, assert_equal_runs, fused, signed, trace

from trl_opsd.losses import BoundedShape, MixtureShape, Shape, Support, fused_divergence, token_divergence
from trl_opsd.losses.closed_form import sweep
from trl_opsd.losses.divergences import Divergence

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
    pytest.skip("TRITON_INTERPRET is not 1; set it, as `make test-real` does", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed: `pip install triton`")
from trl_opsd.losses.sweep_kernel import sweep_by_kernel

SHAPES = [(3, 37, 16), (1, 64, 64), (2, 2500, 1024)]  # positions, entries, entries of a block
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def rule_of(name, clip):
    return Divergence(name, MIXTURE_WEIGHT, clip=clip, clip_value=CLIP_VALUE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_value_and_gradient_are_the_dense_loss_in_float64(rule, shape, dtype):
    *shape, block = shape
    student, target = (draw(*shape, seed=seed).to(dtype) for seed in (0, 1))
    leaf = student.double().requires_grad_()
    wanted = token_divergence(leaf, target.double(), **settings(*rule))
    wide = torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    stats, gradient = sweep_by_kernel(
        student, target, rule_of(*rule), with_gradient=True, temperature=TEMPERATURE, out=wide, block=block
    )
    torch.testing.assert_close(stats[0].double(), wanted.detach(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if rule[0] != "policy_reverse_kl" or rule[1] in (None, "token"):
        wanted.sum().backward()
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-4, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_row_and_the_gradient_in_place_are_those_of_the_plain_sweep(rule):
    student, target, tokens = draw(4, 150, seed=2), draw(4, 150, seed=3), torch.tensor([0, 149, 63, 64])
    target[0], student[1, 5], target[1, 5] = student[0], 40.0, 40.0
    wanted = sweep(student, target, rule_of(*rule), tokens, with_gradient=True)
    stats, gradient = sweep_by_kernel(
        student, target, rule_of(*rule), tokens, with_gradient=True, out=student, block=64
    )
    torch.testing.assert_close((stats, gradient), wanted, rtol=0, atol=1e-10)
    assert gradient is student
    assert not gradient[0].any()  # exactly, where the distributions are equal


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_entry_that_neither_can_have_leaves_finite_numbers(rule):
    student, target = draw(2, 70).float(), draw(2, 70, seed=1).float()
    student[:, 3] = target[:, 3] = -1e30
    stats, gradient = sweep_by_kernel(student, target, rule_of(*rule), with_gradient=True, block=64)
    assert stats.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[:, 3].any()


def test_what_the_kernel_does_not_have_is_refused_by_name():
    for field, value in {
        "support": Support(3),
        "target_floor": 1e-8,
        "relative_floor": 0.1,
        "entropy_top_k": 4,
    }.items():
        with pytest.raises(ValueError, match=field):
            sweep_by_kernel(draw(1, 8), draw(1, 8), Divergence(**{field: value}), with_gradient=False)


@pytest.mark.parametrize("variant", ["all", "softcap"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_loss_with_the_kernel_is_the_plain_one_in_value_gradients_and_diagnostics(rule, variant):
    shape = BoundedShape(2.0, 0.7) if variant == "all" else Shape()
    for tile_tokens in (3, None):
        problem = Problem(rule, shape, variant)
        plain, kernel = (
            problem.run(fused_divergence, tile_tokens=tile_tokens, compiled=by) for by in (False, "kernel")
        )
        assert_equal_runs(kernel, plain, rtol=0, atol=1e-10)


def test_losses_of_facts_and_weighed_ones_take_the_kernel_too():
    problem = Problem(("jsd", "upper"), MixtureShape(0.4, 3.0), "all")
    weighed = {"token_ids": TOKENS, "given": COLUMNS, "weight_of": signed}
    plain, kernel = (problem.run(fused_divergence, compiled=by, **weighed) for by in (False, "kernel"))
    assert_equal_runs(kernel, plain, rtol=0, atol=1e-10)
    plain, kernel = (fused(problem, trace, compiled=by) for by in (False, "kernel"))
    assert_equal_runs(kernel, plain, rtol=0, atol=1e-10)


def test_a_loss_whose_rule_the_kernel_does_not_have_is_refused_by_name():
    problem = Problem(("jsd", None), BoundedShape(2.0, 0.7))
    problem.narrow(support=Support(3))
    with pytest.raises(ValueError, match=r"support=.* is not in the kernel"):
        problem.run(fused_divergence, compiled="kernel")


@pytest.mark.parametrize("rule", [("forward_kl", None), ("jsd", "symmetric")], ids=str)
def test_a_tile_is_read_or_written_seven_times(rule, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    assert import_module("sweep_passes").kernel_passes(rule_of(*rule), (2, 5000)) == pytest.approx(7, abs=0.01)
