# SPDX-License-Identifier: Apache-2.0
"""How far the clipped gradient agrees with the unclipped one: against autograd, and where it must be low or high."""

from dataclasses import replace

import pytest
import torch
from loss_problem import CASES, RULES, Problem

from trl_opsd.losses import (
    Divergence,
    OutputHead,
    Shape,
    Target,
    clip_agreement,
    clip_gradient_products,
    dense_divergence_from_hidden,
    token_divergence,
)

PAPER = Divergence("forward_kl", clip="upper", clip_value=0.05)


def products_of(problem, **extra):
    return problem.call(clip_gradient_products, **extra)


def agreement_of(student, target, rule):
    """From logits (N, V): hidden states that an identity head reads."""
    weights = torch.ones(len(student), dtype=student.dtype)
    head = OutputHead(torch.eye(student.shape[1], dtype=student.dtype))
    products = clip_gradient_products(student, head, Target(target), token_weights=weights, divergence=rule)
    return clip_agreement(products)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("shape", "variant"), CASES, ids=str)
def test_the_products_are_those_of_autograd_through_the_dense_form(rule, shape, variant):
    problem = Problem(rule, shape, variant)

    def gradient(divergence):
        return problem.run(dense_divergence_from_hidden, divergence=divergence)[1][0] / 1.7

    clipped, unclipped = (gradient(replace(problem.settings["divergence"], clip=clip)) for clip in (rule[1], None))
    want = torch.stack([(clipped * unclipped).sum(), clipped.square().sum(), unclipped.square().sum()])
    with torch.no_grad():
        torch.testing.assert_close(products_of(problem), want, rtol=0, atol=1e-12)


def test_parts_of_a_batch_add_up_and_the_parameters_get_no_gradient():
    problem = Problem(("forward_kl", "upper"), Shape(), "bias")
    weights = problem.settings["token_weights"]
    parts = [products_of(problem, token_weights=weights * (torch.arange(7) // 3 == part)) for part in range(3)]
    torch.testing.assert_close(sum(parts), products_of(problem), rtol=0, atol=1e-15)
    assert all(leaf.grad is None for leaf in problem.leaves)


def test_without_a_clip_it_is_1_with_all_cut_0_and_between_equals_there_is_none():
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    assert agreement_of(student, target, replace(PAPER, clip=None)) == pytest.approx(1.0, abs=1e-12)
    assert agreement_of(student, target, Divergence(clip="token", clip_value=1e-6)) == 0.0
    assert agreement_of(student, student, PAPER) is None


def peaked(num_positions, vocabulary, num_apart, seed=0):
    """A student that is sure of one token, and a target that differs by a little noise; at the first positions the
    target is sure of another token, to which the student gives 0.3."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_positions, vocabulary, dtype=torch.float64, generator=generator)
    student[:, 0] += 16
    target = student + 0.5 * torch.randn(student.shape, dtype=torch.float64, generator=generator)
    student[:num_apart, 1] = student[:num_apart, 0] - 0.85
    target[:num_apart, 1] = target[:num_apart, 0] + 4
    return student, target


def test_where_the_clip_cuts_what_the_target_wants_raised_the_gradient_turns():
    # p = (0.5, 0.3, 0.2), q = (0.2, 0.5, 0.3): the first term is 0.46 and is cut; what is left pushes it down.
    student, target = (torch.tensor([row], dtype=torch.float64).log() for row in ((0.2, 0.5, 0.3), (0.5, 0.3, 0.2)))
    assert agreement_of(student, target, PAPER) < -0.5
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(token_divergence(student, target, clip="upper").sum(), student)
    assert gradient[0, 0] > 0  # a step downhill takes from the token that the target wants


@pytest.mark.parametrize(("num_apart", "low", "high"), [(0, 0.95, 1.0), (60, -1.0, 0.1)])
def test_on_a_large_peaked_vocabulary_it_is_the_positions_that_are_cut_which_decide(num_apart, low, high):
    agreement = agreement_of(*peaked(64, 4096, num_apart), PAPER)
    assert low < agreement <= high
