# SPDX-License-Identifier: Apache-2.0
"""The losses that `loss_head.py` compares, and what each contender makes of hidden states; see there."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_opsd.losses import (
    BoundedShape,
    Divergence,
    Facts,
    LinearShape,
    MixtureShape,
    OutputHead,
    Shape,
    Support,
    Target,
    clipped_ratio,
    control_variate_advantage,
    dense_divergence_from_hidden,
    dense_fact_loss,
    fused_divergence,
    fused_fact_loss,
)

TEMPERATURE = 1.1


class Case(NamedTuple):
    """A loss: ours, and TRL's number for its divergence, or what the other contenders lack.

    `loss_of` makes terms of facts in the divergence's place; `num_target_products` is 0 where it reads no target.
    """

    divergence: Divergence
    trl_beta: float | None = None
    lack: str | None = None
    shape: Shape = Shape()
    num_target_products: int = 1
    weight_of: Callable[[Facts], torch.Tensor] | None = None
    loss_of: Callable[[Facts], torch.Tensor] | None = None


def ratio(facts: Facts, advantage: torch.Tensor) -> torch.Tensor:
    """PPO's cut ratio to the policy that sampled, which is the student."""
    return clipped_ratio(facts.log_prob, facts.log_prob.detach(), advantage, low=0.2, high=0.2)


def sampled_token(facts: Facts) -> torch.Tensor:
    """POPD, and in cost EGRSD: a policy gradient whose teacher's numbers are given."""
    advantage = facts.given["view_log_prob"] - facts.log_prob.detach()
    return -advantage * ratio(facts, advantage) * facts.log_prob / facts.given["count"]


def vopd(facts: Facts) -> torch.Tensor:
    """vOPD: the log-ratio less its mean."""
    advantage = control_variate_advantage(facts.log_prob_ratio, facts.divergence)
    return -advantage * ratio(facts, advantage) * facts.log_prob / facts.given["count"]


CASES = {}
for _name, _beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)):
    CASES[_name] = Case(Divergence(_name, temperature=TEMPERATURE), _beta)
    CASES[f"{_name}, clip"] = Case(Divergence(_name, temperature=TEMPERATURE, clip="upper"), lack="has no clip")
CASES["ogls_sd"] = Case(
    Divergence(temperature=TEMPERATURE, clip="symmetric"), lack="has no steered target", shape=LinearShape(3.0)
)
CASES["purified"] = Case(
    Divergence("jsd", temperature=TEMPERATURE),
    lack="has no purified target",
    shape=BoundedShape(),
    num_target_products=2,
)

_LACK = "has no such method"
_LIKELY = Support(100)
_REVERSE = Divergence("reverse_kl", temperature=TEMPERATURE)
CASES |= {
    "sdpo": Case(
        Divergence("jsd", temperature=TEMPERATURE, support=_LIKELY),
        lack=_LACK,
        weight_of=lambda facts: ratio(facts, facts.log_prob),
    ),
    "demopsd": Case(
        Divergence("reverse_kl", temperature=TEMPERATURE, support=_LIKELY, target_floor=1e-8),
        lack=_LACK,
        shape=MixtureShape(),
        num_target_products=2,
        weight_of=lambda facts: ratio(facts, facts.log_prob),
    ),
    "sampled token": Case(_REVERSE, lack=_LACK, num_target_products=0, loss_of=sampled_token),
    "vopd": Case(_REVERSE, lack=_LACK, loss_of=vopd),
    "rethinking-opd": Case(
        Divergence("policy_reverse_kl", temperature=TEMPERATURE, support=Support(16, remainder="whole")), lack=_LACK
    ),
    "rethinking-opd, k 0": Case(
        Divergence("policy_reverse_kl", temperature=TEMPERATURE, support=Support(1, "sampled", "whole")),
        lack=_LACK,
        weight_of=lambda facts: ratio(facts, facts.log_prob_ratio),
    ),
}


class Inputs(NamedTuple):
    """Hidden states of the student and of the target's parts, each (N, H), and the head (V, H).

    `direction` is the weighted sum of nine contexts, four right and five wrong.
    """

    student: torch.Tensor
    anchor: torch.Tensor
    direction: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def draw(cls, size: int, width: int, vocabulary: int, device: str, dtype: torch.dtype) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        student = normal(size, width)
        anchor = student + 0.5 * normal(size, width)
        direction = sum((1 / 4 if i < 4 else -1 / 5) * 0.45 * normal(size, width) for i in range(9))
        weight = normal(vocabulary, width).mul_(3 / width**0.5)
        return cls(student, anchor, direction, weight).to(dtype)

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(tensor.to(dtype) for tensor in self))

    def at(self, rows: slice) -> "Inputs":
        return Inputs(self.student[rows], self.anchor[rows], self.direction[rows], self.weight)

    def leaves(self, trained: bool) -> "Inputs":
        return self._replace(
            student=self.student.detach().requires_grad_(), weight=self.weight.detach().requires_grad_(trained)
        )


Contender = Callable[[Inputs, Case], torch.Tensor]


def dense(inputs: Inputs, case: Case) -> torch.Tensor:
    with torch.no_grad():
        target_logits = inputs.anchor @ inputs.weight.T
    return GKDTrainer.generalized_jsd_loss(
        inputs.student @ inputs.weight.T,
        target_logits,
        beta=case.trl_beta,
        temperature=TEMPERATURE,
        num_items_in_batch=len(inputs.student),
    )


def chunked(inputs: Inputs, case: Case) -> torch.Tensor:
    weight = inputs.weight
    per_token, _ = ChunkedDivergenceFunction.apply(
        inputs.student, weight, None, inputs.anchor, weight.detach(), None, case.trl_beta, TEMPERATURE
    )
    return per_token.mean()


def liger(inputs: Inputs, case: Case) -> torch.Tensor:
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except Exception as error:  # without Triton or a GPU its import may fail in many ways
        raise DoesNotRunError(f"{type(error).__name__}: {error}") from error
    if not inputs.weight.is_cuda:
        raise DoesNotRunError("its Triton kernels need a GPU")
    loss = LigerFusedLinearJSD(jsd_beta=case.trl_beta, temperature=TEMPERATURE)
    return loss(inputs.student, inputs.weight, inputs.anchor, inputs.weight.detach(), None)


def top_100(inputs: Inputs, case: Case) -> torch.Tensor:
    with torch.no_grad():
        target_logits = inputs.anchor @ inputs.weight.T / TEMPERATURE
    return compute_topk_self_distillation_loss(
        inputs.student @ inputs.weight.T / TEMPERATURE,
        target_logits,
        distillation_topk=min(100, len(inputs.weight)),
        distillation_alpha=case.trl_beta,
        distillation_add_tail=False,
    ).mean()


def ours(inputs: Inputs, case: Case) -> torch.Tensor:
    if case.loss_of is not None:
        return fused_fact_loss(*_hidden(inputs, case), **_fact_settings(inputs, case), pointwise=True)[0]
    return fused_divergence(*_hidden(inputs, case), **_settings(inputs, case, len(inputs.student)))[0]


def compiled(inputs: Inputs, case: Case) -> torch.Tensor:
    settings = _settings(inputs, case, len(inputs.student))
    return fused_divergence(*_hidden(inputs, case), **settings, compiled=True)[0]


CONTENDERS: dict[str, Contender] = {
    "dense": dense,
    "chunked": chunked,
    "liger": liger,
    "top-100": top_100,
    "ours": ours,
    "compiled": compiled,
}
OURS = ("ours", "compiled")


class DoesNotRunError(Exception):
    """A contender that this machine cannot run, with the reason."""


def floor(inputs: Inputs, case: Case, trained: bool) -> None:
    """The bare products, a tile of positions at a time, in the dtype of `inputs`."""
    weight = inputs.weight
    tile = torch.empty(2048 if weight.is_cuda else 256, len(weight), device=weight.device, dtype=weight.dtype)
    grad = torch.empty_like(inputs.student)
    grad_weight = torch.zeros_like(weight) if trained else None
    for start in range(0, len(grad), len(tile)):
        rows = slice(start, start + len(tile))
        out = tile[: len(grad[rows])]
        for hidden in (inputs.anchor, inputs.direction)[: case.num_target_products]:
            torch.mm(hidden[rows], weight.T, out=out)
        torch.mm(inputs.student[rows], weight.T, out=out)
        torch.mm(out, weight, out=grad[rows])
        if trained:
            grad_weight.addmm_(out.T, inputs.student[rows])


def floor_flop(case: Case, trained: bool, size: int, width: int, vocabulary: int) -> int:
    """FLOP of the bare products: targets, student, its gradient and, where the head trains, the head's."""
    return 2 * size * width * vocabulary * (case.num_target_products + 2 + trained)


class Gradients(NamedTuple):
    """A loss in nats with its gradient to the hidden states (N, H) and, where it trains, the head (V, H)."""

    loss: float
    hidden: torch.Tensor
    weight: torch.Tensor | None


def backpropagate(contender: Contender, inputs: Inputs, case: Case, trained: bool, autocast: bool) -> Gradients:
    inputs = inputs.leaves(trained)
    with torch.autocast(inputs.weight.device.type, torch.bfloat16, enabled=autocast):
        loss = contender(inputs, case)
    loss.backward()
    return Gradients(loss.item(), inputs.student.grad, inputs.weight.grad)


def exact(inputs: Inputs, case: Case, rows_at_a_time: int = 64) -> Gradients:
    """Loss and both gradients in float64, by the plain form."""
    size, total, grads = len(inputs.student), 0.0, []
    weight = inputs.weight.detach().double().requires_grad_()
    rows_at_a_time = rows_at_a_time if case.loss_of is None else size  # its terms are divided by their number
    for start in range(0, size, rows_at_a_time):
        part = inputs.at(slice(start, start + rows_at_a_time))._replace(weight=weight).to(torch.float64)
        part = part._replace(student=part.student.detach().requires_grad_())
        if case.loss_of is None:
            loss, _ = dense_divergence_from_hidden(*_hidden(part, case), **_settings(part, case, size))
        else:
            loss, _ = dense_fact_loss(*_hidden(part, case), **_fact_settings(part, case))
        loss.backward()
        total += loss.item()
        grads.append(part.student.grad)
    return Gradients(total, torch.cat(grads), weight.grad)


def _hidden(inputs: Inputs, case: Case) -> tuple:
    direction = inputs.direction if case.shape.uses_direction else None
    target = Target(inputs.anchor, direction, case.shape) if case.num_target_products else None
    return inputs.student, OutputHead(inputs.weight), target


def _settings(inputs: Inputs, case: Case, size: int) -> dict[str, Any]:
    weights = torch.full((len(inputs.student),), 1 / size, device=inputs.student.device, dtype=torch.float64)
    settings = {"token_weights": weights, "divergence": case.divergence}
    return settings | ({} if case.weight_of is None else {"weight_of": case.weight_of, "token_ids": _tokens(inputs)})


def _fact_settings(inputs: Inputs, case: Case) -> dict[str, Any]:
    size, device = len(inputs.student), inputs.student.device
    given = {
        "view_log_prob": torch.full((size,), -2.0, device=device),
        "count": torch.tensor(float(size), device=device),
    }
    return {"token_ids": _tokens(inputs), "loss_of": case.loss_of, "given": given, "divergence": case.divergence}


def _tokens(inputs: Inputs) -> torch.Tensor:
    """(N,) any tokens; what they are costs nothing."""
    return (inputs.student[:, 0] * 1000).abs().long() % len(inputs.weight)
