# SPDX-License-Identifier: Apache-2.0
"""One problem of the losses from hidden states, alike for the fused and the dense form, and what its tests share."""

import dataclasses
import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd.losses import (
    CLIPS,
    DIVERGENCES,
    BoundedShape,
    Divergence,
    LinearShape,
    OutputHead,
    Shape,
    Target,
    fused_fact_loss,
)

N, H, V = 7, 5, 11
RULES = list(itertools.product(DIVERGENCES, CLIPS))
SHAPES = [Shape(), LinearShape(1.5), BoundedShape(2.0, 0.7)]
VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 1.3},
    "bias": {"head_bias": True},
    "scale": {"logit_scale": 0.5, "temperature": 1.3},
    "num_tokens": {"num_tokens": 9, "head_bias": True},
    "target head": {"target_head": True, "head_bias": True},
    "target head and bias": {"target_head": True, "target_head_bias": True, "head_bias": True},
    "all": {
        "logit_scale": 0.5,
        "temperature": 1.3,
        "num_tokens": 9,
        "head_bias": True,
        "target_head": True,
        "target_head_bias": True,
    },
    "softcap": {"logit_softcap": 3.0, "logit_scale": 0.5, "temperature": 1.3, "head_bias": True, "target_head": True},
}
# A direction under a capped head is refused, see below.
CASES = [(shape, name) for shape in SHAPES for name in VARIANTS if name != "softcap" or not shape.uses_direction]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Problem:
    """Leaves with a gradient, a frozen target and settings of one call, alike for both forms."""

    def __init__(self, rule, shape, variant="plain", dtype=torch.float64):
        options = dict(VARIANTS[variant])
        name, clip = rule
        self.hidden, self.weight = draw(N, H, dtype=dtype), draw(V, H, seed=1, dtype=dtype)
        self.bias = draw(V, seed=4, dtype=dtype) if options.pop("head_bias", False) else None
        self.anchor, self.direction = draw(N, H, seed=2, dtype=dtype), draw(N, H, seed=3, dtype=dtype)
        if not shape.uses_direction:
            self.direction = None
        self.shape = shape
        self.leaves = [leaf.requires_grad_() for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]
        self.logits = {key: options.pop(key) for key in ("logit_scale", "logit_softcap") if key in options}
        self.target_head = None
        if options.pop("target_head", False):
            bias = draw(V, seed=6, dtype=dtype) if options.pop("target_head_bias", False) else None
            self.target_head = OutputHead(draw(V, H, seed=5, dtype=dtype), bias, **self.logits)
        self.settings = {
            "divergence": Divergence(name, 0.3, options.pop("temperature", 1.0), clip, 0.05),
            "token_weights": torch.tensor([0.3, 0.1, 0.0, 0.7, 0.2, 0.0, 0.4], dtype=torch.float64),
            **options,
        }

    def narrow(self, **changes):
        """Change fields of the divergence."""
        self.settings["divergence"] = dataclasses.replace(self.settings["divergence"], **changes)

    def call(self, function, **extra):
        """Loss and diagnostics."""
        head = OutputHead(self.weight, self.bias, **self.logits)
        target = Target(self.anchor, self.direction, self.shape, self.target_head)
        return function(self.hidden, head, target, **{**self.settings, **extra})

    def run(self, function, **extra):
        """Loss, gradients to the leaves and diagnostics."""
        loss, diagnostics = self.call(function, **extra)
        return loss, torch.autograd.grad(1.7 * loss, self.leaves), diagnostics


def assert_equal_runs(fused, dense, **tolerance):
    for got, want in zip(fused, dense, strict=True):
        torch.testing.assert_close(got, want, check_dtype=False, **tolerance)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.makers = {}  # elements -> the operations that made such a tensor, in-place ones left out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not torch.is_tensor(tensor):
                continue
            self.numel = max(self.numel, tensor.numel())
            if not func.__name__.split(".")[0].endswith("_"):
                self.makers.setdefault(tensor.numel(), []).append(func.__name__)
        return result


TOKENS = torch.tensor([3, 0, 8, 5, 5, 1, 7])
COLUMNS = {"advantage": draw(N, seed=11), "views": draw(3, N, seed=12), "largest": torch.tensor(1.7)}


def signed(facts):
    """A weight that reads every fact, of both signs."""
    views = (facts.given["views"] * torch.tensor([0.5, -0.2, 0.1])[:, None]).sum(0)
    gates = torch.exp(-facts.student_entropy) - facts.target_entropy / facts.given["largest"] + 0.1 * facts.divergence
    return facts.given["advantage"] * torch.tanh(facts.log_prob_ratio) + gates * views + 0.3 * facts.log_prob.exp()


def logits_of(problem):
    """Tempered logits of the student and log-probabilities of a target without a direction, all positions."""
    scale, cap = problem.logits.get("logit_scale", 1.0), problem.logits.get("logit_softcap")
    count, rule = problem.settings.get("num_tokens"), problem.settings["divergence"]

    def tempered(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)[:, :count] * scale
        return (logits if cap is None else cap * torch.tanh(logits / cap)) / rule.temperature

    head = problem.target_head
    frozen = (problem.weight, problem.bias) if head is None else (head.weight, head.bias)
    student = tempered(problem.hidden, problem.weight, problem.bias)
    return student, tempered(problem.anchor, *frozen).detach().log_softmax(-1)


GIVEN = {**COLUMNS, "old_log_prob": draw(N, seed=21) - 2.5, "pair": torch.tensor([0, 0, 1, 1, 1, 0, 1])}


def surrogate(facts, advantage, low=0.2, high=0.28):
    ratio = torch.exp(facts.log_prob - facts.given["old_log_prob"])
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ratio_of(facts):
    """u as a constant; against the given reference where there is no target."""
    target = facts.given["reference"] if facts.target_log_prob is None else facts.target_log_prob
    return (target - facts.log_prob).detach()


def trace(facts):
    """A policy gradient everywhere, and a divergence on some positions."""
    return surrogate(facts, facts.given["advantage"]) + 0.7 * (facts.given["pair"] == 0) * facts.clipped_divergence


def fused(problem, loss_of, target=True, **extra):
    """Loss, gradients to the leaves and diagnostics."""
    head = OutputHead(problem.weight, problem.bias, **problem.logits)
    goal = Target(problem.anchor, problem.direction, problem.shape, problem.target_head) if target else None
    settings = {name: problem.settings[name] for name in ("divergence", "num_tokens") if name in problem.settings}
    call = extra.pop("form", fused_fact_loss)
    settings |= {"token_ids": TOKENS, "given": GIVEN, **extra}
    loss, diagnostics = call(problem.hidden, head, goal, loss_of=loss_of, **settings)
    return loss, torch.autograd.grad(1.7 * loss, problem.leaves, retain_graph=True), diagnostics
