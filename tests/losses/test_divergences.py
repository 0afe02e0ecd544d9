# SPDX-License-Identifier: Apache-2.0
"""Dense divergences against loops over the vocabulary written out with `math`, and their properties."""

import dataclasses
import inspect
import math

import pytest
import torch
from divergences_by_hand import (
    CLIP_VALUE,
    DIFFERENTIATED,
    RULES,
    TEMPERATURE,
    draw,
    settings,
    softmax_by_hand,
    term_and_slope,
)

from trl_opsd.losses import CLIPS, DIVERGENCES, Divergence, token_divergence


def by_hand(student, target, name, clip):
    """Value and gradient to the student's logits of one position."""
    q, p = softmax_by_hand(student), softmax_by_hand(target)
    terms, slopes = zip(*(term_and_slope(name, *pair) for pair in zip(q, p, strict=True)), strict=True)
    low = {"upper": -math.inf, "symmetric": -CLIP_VALUE}.get(clip, -math.inf)
    high = CLIP_VALUE if clip in ("upper", "symmetric") else math.inf
    slopes = [g if low <= term <= high else 0.0 for term, g in zip(terms, slopes, strict=True)]
    value = sum(min(max(term, low), high) for term in terms)
    gradient = [(g - q_i * sum(slopes)) / TEMPERATURE for g, q_i in zip(slopes, q, strict=True)]
    if clip == "token" and value > CLIP_VALUE:
        return CLIP_VALUE, [0.0] * len(gradient)
    return value, gradient


@pytest.mark.parametrize(("name", "clip"), RULES)
def test_value_and_gradient_equal_loops_over_the_vocabulary(name, clip):
    student, target = draw(5, 6).requires_grad_(), draw(5, 6, seed=1)
    target[4] = student[4].detach() + 0.01 * target[4]  # one position below the token clip
    value = token_divergence(student, target, **settings(name, clip))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    for row in range(5):
        want_value, want_gradient = by_hand(student[row].tolist(), target[row].tolist(), name, clip)
        assert value[row].item() == pytest.approx(want_value, abs=1e-12)
        assert gradient[row].tolist() == pytest.approx(want_gradient, abs=1e-12)


@pytest.mark.parametrize(("name", "clip"), DIFFERENTIATED)
def test_gradient_equals_finite_differences(name, clip):
    target = draw(2, 3, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda student: token_divergence(student, target, **settings(name, clip)),
        draw(2, 3, 6).requires_grad_(),
    )


@pytest.mark.parametrize(("name", "clip"), RULES)
def test_equal_distributions_have_divergence_exactly_zero(name, clip):
    student = draw(3, 50).float().requires_grad_()
    value = token_divergence(student, student, **settings(name, clip))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert not value.any()
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if "reverse_kl" not in name or "skewed" in name])
@pytest.mark.parametrize("clip", CLIPS)
def test_target_probability_zero_gives_finite_value_and_gradient(name, clip):
    student, target = draw(3, 6).float().requires_grad_(), draw(3, 6, seed=1).float()
    target[:, 2] = -torch.inf
    value = token_divergence(student, target, **settings(name, clip))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and gradient.isfinite().all()
    near = target.masked_fill(target == -torch.inf, -300.0)
    torch.testing.assert_close(value, token_divergence(student, near, **settings(name, clip)))


def test_reverse_kl_is_infinite_where_the_target_has_probability_zero():
    target = draw(1, 6, seed=1)
    target[0, 0] = -torch.inf
    assert token_divergence(draw(1, 6), target, divergence="reverse_kl").item() == math.inf


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_stay_finite(name):
    student = torch.tensor([[0.0, 300.0, -300.0], [500.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[300.0, 0.0, -300.0], [-500.0, 0.0, 0.0]])
    value = token_divergence(student, target, divergence=name)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and gradient.isfinite().all()
    if name == "jsd":
        torch.testing.assert_close(value, torch.full((2,), math.log(2)))


def test_a_clipped_entry_is_pushed_down_and_the_clipped_sum_may_be_negative():
    student = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    value = token_divergence(student, target, clip="upper")
    (clipped,) = torch.autograd.grad(value, student)
    (unclipped,) = torch.autograd.grad(token_divergence(student, target), student)
    assert value < 0
    assert unclipped[0] < 0 < clipped[0]  # descent raises the first logit without the clip, lowers it with it


def test_target_and_student_given_in_bfloat16_are_compared_in_float32():
    student, target = draw(4, 30).bfloat16(), draw(4, 30, seed=1).bfloat16()
    value = token_divergence(student, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), token_divergence(student.double(), target.double()), rtol=1e-5, atol=0)


def test_target_gets_no_gradient():
    target = draw(2, 6, seed=1).requires_grad_()
    loss = token_divergence(draw(2, 6).requires_grad_(), target).sum()
    assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("divergence", "kl"),
        ("clip", "lower"),
        ("clip_value", 0.0),
        ("clip_value", math.nan),
        ("mixture_weight", 0.0),
        ("mixture_weight", 1.0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("target_floor", 0.0),
        ("target_floor", 1.0),
        ("relative_floor", -0.2),
        ("relative_floor", 1.5),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}.* set "):
        token_divergence(draw(2, 3), draw(2, 3), **{field: value})


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="target_logits has shape"):
        token_divergence(draw(2, 3), draw(1, 3))
    with pytest.raises(ValueError, match="student_logits has dtype"):
        token_divergence(torch.ones(2, 3, dtype=torch.long), draw(2, 3))


def test_keyword_defaults_are_those_of_the_value_object():
    parameters = inspect.signature(token_divergence).parameters
    for field in dataclasses.fields(Divergence):
        if field.name == "entropy_top_k":  # a fact beside the divergence, which it does not change
            continue
        name = "divergence" if field.name == "name" else field.name
        assert parameters[name].default == field.default
