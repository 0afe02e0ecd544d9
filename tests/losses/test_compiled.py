# SPDX-License-Identifier: Apache-2.0
"""The loss with its elementwise work compiled: the same numbers."""

import shutil

import pytest
import torch
from loss_problem import COLUMNS, RULES, TOKENS, Problem, assert_equal_runs, fused, signed, trace

from trl_opsd.losses import BoundedShape, MixtureShape, Support, fused_divergence, tiles

COMMON = [("forward_kl", "upper"), ("jsd", None)]
compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")


@compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # by Inductor itself
@pytest.mark.parametrize(
    "rule",
    [*COMMON, *(pytest.param(rule, marks=pytest.mark.exhaustive) for rule in RULES if rule not in COMMON)],
    ids=str,
)
def test_compiled_equals_eager_in_value_gradients_and_diagnostics(rule):
    torch._dynamo.reset()  # beyond so many kinds of call torch falls back to eager
    tiles._sweep_by.cache_clear()
    for tile_tokens in (3, None):  # 5 positions have weight: a whole tile, the rest of one, all in one
        problem = Problem(rule, BoundedShape(2.0, 0.7), "all")
        eager = problem.run(fused_divergence, tile_tokens=tile_tokens)
        compiled = problem.run(fused_divergence, tile_tokens=tile_tokens, compiled=True)
        assert_equal_runs(compiled, eager, rtol=0, atol=1e-9)


@compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("support", [Support(3), Support(2, "union", "renormalise")], ids=str)
def test_compiled_equals_eager_with_a_support_a_weight_and_a_loss_of_facts(support):
    torch._dynamo.reset()
    tiles._sweep_by.cache_clear()
    problem = Problem(("jsd", "upper"), MixtureShape(0.4, 3.0), "all")
    problem.narrow(support=support)
    weighed = {"token_ids": TOKENS, "given": COLUMNS, "weight_of": signed}
    eager, compiled = (problem.run(fused_divergence, compiled=flag, **weighed) for flag in (False, True))
    assert_equal_runs(compiled, eager, rtol=0, atol=1e-9)
    eager, compiled = (fused(problem, trace, compiled=flag) for flag in (False, True))
    assert_equal_runs(compiled, eager, rtol=0, atol=1e-9)


def test_what_a_loss_can_be_compiled_by_is_refused_by_name():
    with pytest.raises(ValueError, match="compiled='fast' is neither True, False nor 'kernel'"):
        Problem(("jsd", None), BoundedShape(2.0, 0.7)).run(fused_divergence, compiled="fast")
