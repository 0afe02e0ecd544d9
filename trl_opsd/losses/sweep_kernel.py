# SPDX-License-Identifier: Apache-2.0
"""The sweep of `closed_form.py` as one Triton kernel; that function is its plain twin.

A program has one position and goes over its entries three times: statistics of both distributions; terms, clips and the
sum of the slope; the gradient. So both tiles are read three times and one is written once, 7 passes. This module needs
Triton and is imported only where it is asked for. It has run in Triton's interpreter alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .divergences import Divergence, compute_dtype
from .forms import MAX_LOG_RATIO

BLOCK_ENTRIES = 4096
_LIMIT = tl.constexpr(MAX_LOG_RATIO)
_LOWEST = tl.constexpr(-3e38)  # finite, so that no difference of two is NaN


def sweep_by_kernel(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rule: Divergence,
    token_ids: torch.Tensor | None = None,
    *,
    with_gradient: bool,
    temperature: float = 1.0,
    out: torch.Tensor | None = None,
    block: int = BLOCK_ENTRIES,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What [`closed_form.sweep`] returns, by the kernel.

    Args:
        student_logits, target_logits: (n, V), finite, of any floating-point dtype.
        rule: the divergence and its clip, over the whole vocabulary.
        token_ids: (n,) int64 sampled tokens, or None.
        with_gradient: False leaves the gradient out.
        temperature: both logits are divided by it, > 0.
        out: (n, V) of any dtype that takes the gradient; it may be `student_logits`. None makes one.
        block: entries at a time, a power of two.

    Returns:
        (6, n), or (8, n) with token ids, and the (n, V) gradient or None.

    Raises:
        ValueError: for a rule with a support, a floor or `entropy_top_k`, which the kernel does not have.
    """
    check_rule(rule)
    student, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (student_logits, target_logits))
    dtype = compute_dtype(torch.promote_types(student.dtype, target.dtype))
    size, width = student.shape
    logs = [] if token_ids is None else [x.gather(-1, token_ids[:, None])[:, 0].to(dtype) for x in (student, target)]
    stats = torch.empty(8, size, dtype=dtype, device=student.device)
    if out is None:
        out = torch.empty_like(student) if with_gradient else student
    clip_value = rule.clip_value if rule.clip else 0.0
    if size:
        _sweep[(size,)](
            student, target, out, stats, student.stride(0), target.stride(0), out.stride(0), size, width,
            rule.name, rule.clip or "none", clip_value, rule.mixture_weight, 1 / temperature,
            with_gradient, dtype == torch.float64, block,
        )  # fmt: skip
    sampled = [log / temperature - norm for log, norm in zip(logs, stats[6:], strict=False)]
    return torch.stack([*stats[:6], *sampled]), out if with_gradient else None


def check_rule(rule: Divergence) -> None:
    """Raise a ValueError that names the first setting of `rule` that the kernel does not have."""
    for field in ("support", "target_floor", "relative_floor", "entropy_top_k"):
        if getattr(rule, field) is not None:
            raise ValueError(f"{field}={getattr(rule, field)} is not in the kernel; set compiled=True or False.")


@triton.jit
def _expm1(x):
    u = tl.exp(x)
    near = (u == 1.0) | (u - 1.0 == -1.0)
    safe = tl.where(near, 2.0, u)
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, (safe - 1.0) * x / tl.log(safe)))


@triton.jit
def _log1p(x):
    u = 1.0 + x
    safe = tl.where(u == 1.0, 2.0, u)
    return tl.where(u == 1.0, x, tl.log(safe) * x / (safe - 1.0))


@triton.jit
def _load(start, at, width, scale, WIDE: tl.constexpr):
    x = tl.load(start + at, mask=at < width, other=0.0)
    x = x.to(tl.float64) if WIDE else x.to(tl.float32)
    return tl.where(at < width, x * scale, _LOWEST)


@triton.jit
def _grown(z, top, mass, moment):
    """Maximum, sum of e^(z - top) and of (z - top) e^(z - top) with one more block."""
    new = tl.maximum(top, tl.max(z, 0))
    scale = tl.exp(top - new)
    e = tl.exp(z - new)
    moment = scale * (moment + (top - new) * mass) + tl.sum(e * (z - new), 0)
    return new, scale * mass + tl.sum(e, 0), moment


@triton.jit
def _slope(log_q, log_p, NAME: tl.constexpr, W: tl.constexpr):
    """Terms, g + c q and c q, as the table of `forms.py` has them."""
    q, p = tl.exp(log_q), tl.exp(log_p)
    if NAME == "forward_kl":
        return p * (log_p - log_q), q - p, q
    elif NAME == "reverse_kl":
        return q * (log_q - log_p), q * (log_q - log_p), -q
    elif NAME == "policy_reverse_kl":
        return q * (log_q - log_p), q * (log_q - log_p), q * 0.0
    else:
        ratio = tl.minimum(tl.maximum(log_p - log_q, -_LIMIT), _LIMIT)
        over_q = _log1p(W * _expm1(ratio))
        over_m = ratio - over_q
        if NAME == "jsd":
            slope = (W - 1) * q * over_q
            return W * p * over_m + slope, slope, q * 0.0
        elif NAME == "skewed_forward_kl":
            return p * over_m, (W - 1) * q * _expm1(over_m), (1 - W) * q
        else:
            tl.static_assert(NAME == "skewed_reverse_kl")
            return -q * over_q, q * ((W - 1) * _expm1(-over_q) - over_q), -W * q


@triton.jit
def _cut(terms, CLIP: tl.constexpr, BOUND: tl.constexpr):
    """Whether an entry's clip cuts each term."""
    if CLIP == "upper":
        return terms > BOUND
    elif CLIP == "symmetric":
        return tl.abs(terms) > BOUND
    else:
        return terms != terms


@triton.jit
def _sweep(student, target, out, stats, student_step, target_step, out_step, size, width: tl.constexpr,
           NAME: tl.constexpr, CLIP: tl.constexpr, BOUND: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr,
           GRADIENT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_step
    target += row * target_step
    out += row * out_step
    zero = tl.sum(tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32), 0)
    top_q, mass_q, moment_q = zero + _LOWEST, zero, zero
    top_p, mass_p, moment_p, there = zero + _LOWEST, zero, zero, zero + _LOWEST
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, y = _load(student, at, width, SCALE, WIDE), _load(target, at, width, SCALE, WIDE)
        first = tl.min(tl.where(y == tl.max(y, 0), at, width), 0)
        there = tl.where(tl.max(y, 0) > top_p, tl.max(tl.where(at == first, z, _LOWEST), 0), there)
        top_q, mass_q, moment_q = _grown(z, top_q, mass_q, moment_q)
        top_p, mass_p, moment_p = _grown(y, top_p, mass_p, moment_p)
    norm_q, norm_p = top_q + tl.log(mass_q), top_p + tl.log(mass_p)
    value, plain, count, total = zero, zero, zero, zero
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log_q = _load(student, at, width, SCALE, WIDE) - norm_q
        log_p = _load(target, at, width, SCALE, WIDE) - norm_p
        terms, slope, multiple = _slope(log_q, log_p, NAME, W)
        terms, slope = tl.where(at < width, terms, 0.0), tl.where(at < width, slope, 0.0)
        cut = _cut(terms, CLIP, BOUND)
        kept = tl.where(cut, tl.where(terms > 0, zero + BOUND, zero - BOUND), terms)
        value += tl.sum(kept, 0)
        plain += tl.sum(terms, 0)
        count += tl.sum(tl.where(cut, 1.0, 0.0), 0)
        total += tl.sum(tl.where(cut, multiple, slope), 0)
    over = (plain > BOUND) & (CLIP == "token")
    value = tl.where(over, zero + BOUND, value)
    share = tl.where(over, 1.0, count / width)
    tl.store(stats + row, value)
    tl.store(stats + size + row, plain)
    tl.store(stats + 2 * size + row, share)
    tl.store(stats + 3 * size + row, tl.log(mass_q) - moment_q / mass_q)
    tl.store(stats + 4 * size + row, tl.log(mass_p) - moment_p / mass_p)
    tl.store(stats + 5 * size + row, tl.where(there == top_q, 1.0, 0.0))
    tl.store(stats + 6 * size + row, norm_q)
    tl.store(stats + 7 * size + row, norm_p)
    if GRADIENT:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            log_q = _load(student, at, width, SCALE, WIDE) - norm_q
            log_p = _load(target, at, width, SCALE, WIDE) - norm_p
            terms, slope, multiple = _slope(log_q, log_p, NAME, W)
            gradient = tl.where(_cut(terms, CLIP, BOUND), multiple, slope) - tl.exp(log_q) * total
            gradient = tl.where(over, 0.0, gradient * SCALE)
            tl.store(out + at, gradient.to(out.dtype.element_ty), mask=at < width)
