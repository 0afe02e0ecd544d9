# SPDX-License-Identifier: Apache-2.0
"""What a method's rule makes of the numbers of each token: weights, terms, advantages, and which way a token is pushed.

The rules are the method's own functions, asked about one rollout; the facts they read come from dense logits. Of what
training knows beside them, the old policy is the student itself and the engine's weight is 1.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ..losses import Facts
from ..methods import Method, RowFacts, Term
from ..teacher.contexts import Moment
from .records import RolloutRecord, ViewRecord

Values = dict[str, torch.Tensor]


def group_advantages(rewards: Sequence[float | None], settings: Any) -> list[float]:
    """TRL's advantages of a group, times `reward_weight`; 0 for a rollout without a reward, and where the weight is 0.

    Args:
        rewards: of the group.
        settings: reads `reward_weight` and `scale_rewards`. For "batch" the group's deviation stands for the batch's.
    """
    known = [reward for reward in rewards if reward is not None and not math.isnan(reward)]
    if not settings.reward_weight or len(known) < 2:
        return [0.0] * len(rewards)
    mean = sum(known) / len(known)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    factor = settings.reward_weight / (1.0 if settings.scale_rewards in ("none", False) else deviation + 1e-4)
    return [0.0 if reward is None or math.isnan(reward) else factor * (reward - mean) for reward in rewards]


def row_facts(record: RolloutRecord, given: dict[str, Any], extra: RowFacts | None = None) -> RowFacts:
    """The facts (1, T) of a record's tokens, whose log-probability and divergences can be differentiated.

    Args:
        record: with its views and, where there is a target, `divergence` and `clipped_away`.
        given: numbers or sequences of T, under the names of `RowFacts.given`.
        extra: facts of the sequence beside it.
    """
    student = record.views[0]
    target = next((view for view in record.views if view.name == "target"), None)
    log_prob = _row(student.log_prob).requires_grad_()
    divergence = clipped = None
    if target is not None:
        divergence = _row(record.values["divergence"]).requires_grad_()
        clipped = divergence
        if any(record.values["clipped_away"]):
            clipped = (divergence.detach() - _row(record.values["clipped_away"])).requires_grad_()
    columns = {name: _row(value).expand(log_prob.shape) for name, value in given.items()}
    columns |= _view_columns([view for view in record.views if view.weight is not None], log_prob)
    columns["old_log_prob"] = log_prob.detach()
    columns["engine_weight"] = torch.ones_like(columns["old_log_prob"])
    return RowFacts(
        log_prob=log_prob,
        target_log_prob=None if target is None else _row(target.log_prob),
        student_entropy=_row(student.entropy),
        target_entropy=None if target is None else _row(target.entropy),
        divergence=divergence,
        clipped_divergence=clipped,
        target_top_entropy=_row(record.values["target_top_entropy"]) if "target_top_entropy" in record.values else None,
        given=columns,
        extra=extra,
        kept={},
    )


def no_facts() -> RowFacts:
    """The facts of a sequence that is missing: one token that does not count."""
    nothing = RolloutRecord.of_views([ViewRecord("student", 0, [0.0], [1], [0.0], [[]], [[]])])
    return row_facts(nothing, {"mask": 0.0})


def apply_rule(method: Method, settings: Any, moment: Moment, facts: RowFacts) -> tuple[Values, Values, float | None]:
    """What the method makes of the facts of one rollout.

    Returns:
        Numbers (T,) by name: `weight` of the divergence, `term` that is minimised, `advantage`, and `push`: how much the
        loss falls where the token's log-probability rises; times T where the loss is one number for the rollout. The `push`
        of the extra likewise. Also `own@NAME`: what its rules kept of their own. And the loss of the rollout as one number, where the method gives that.
    """
    mask = facts.given["mask"][0] != 0
    if method.token_weight is not None:
        weight = method.token_weight(_flat(facts), settings, moment).detach() * mask
        terms = weight * facts.clipped_divergence.detach()[0]
        return {"weight": weight, "term": terms, **_kept(facts)}, {}, None
    values: Values = {}
    extra: Values = {}
    number = None
    if method.loss is not None:
        values, extra, number = _loss_values(method, settings, moment, facts)
    if method.advantages is not None:
        advantage = method.advantages(facts, settings, moment).detach()
        values["advantage"] = torch.where(facts.given["mask"] != 0, advantage, facts.given["advantage"])[0]
    return values | _kept(facts), extra, number


def _kept(facts: RowFacts) -> Values:
    """`own@NAME` (T,) of what the rules kept, with a number behind the name where it is of several views; 0 off the mask."""
    shown: Values = {}
    for name, values in facts.kept.items():
        several = values.ndim == 3 and len(values) > 1
        for place, row in enumerate(values if values.ndim == 3 else values[None], 1):
            row = torch.where(facts.given["mask"] != 0, row, 0.0)[0]
            shown[f"own@{name} {place}" if several else f"own@{name}"] = row
    return shown


def _loss_values(method: Method, settings: Any, moment: Moment, facts: RowFacts) -> tuple[Values, Values, float | None]:
    with torch.enable_grad():
        terms = _terms(method, settings, moment, facts)
        counted = terms if terms.ndim == 1 else terms.masked_fill(facts.given["mask"] == 0, 0.0)
        leaves = {"push": facts.log_prob, "weight": facts.clipped_divergence}
        if facts.extra is not None:
            leaves["extra"] = facts.extra.log_prob
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        slopes = [None] * len(leaves)
        if counted.requires_grad:
            slopes = torch.autograd.grad(counted.sum(), list(leaves.values()), allow_unused=True)
    found = {name: slope[0] for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
    values = {name: -slope if name == "push" else slope for name, slope in found.items() if name != "extra"}
    if terms.ndim > 1:
        return {"term": counted.detach()[0], **values}, {}, None
    values = {name: slope * slope.numel() for name, slope in values.items()}  # a mean over tokens leaves little of each
    return values, {"push": -found["extra"] * found["extra"].numel()} if "extra" in found else {}, terms.item()


def apply_term(term: Term, settings: Any, moment: Moment, facts: RowFacts) -> Values:
    """What the term of extras makes of the facts of one: numbers (T,) as in `apply_rule`, its weight in them."""
    factor = term.weight(settings)
    if term.loss is None:
        divergence = facts.clipped_divergence.detach()[0]
        return {"weight": torch.full_like(divergence, factor), "term": factor * divergence}
    with torch.enable_grad():
        terms = factor * term.loss(facts, settings, moment)
        (slope,) = torch.autograd.grad(terms.sum(), [facts.log_prob], allow_unused=True)
    push = {} if slope is None else {"push": -slope[0]}
    return {"term": terms.detach()[0], **push}


def _terms(method: Method, settings: Any, moment: Moment, facts: RowFacts) -> torch.Tensor:
    """(1, T) or (1,) what the method's loss gives; a pointwise one is asked with flat facts."""
    if method.pointwise:
        return method.loss(_flat(facts, detached=False), settings, moment).unsqueeze(0)
    return method.loss(facts, settings, moment)


def _flat(facts: RowFacts, *, detached: bool = True) -> Facts:
    """The same as (T,), as a weight of the divergence is asked."""
    names = [field.name for field in fields(Facts) if field.name not in ("given", "kept")]
    numbers = {name: getattr(facts, name) for name in names}
    numbers = {name: number.detach() if detached and number is not None else number for name, number in numbers.items()}
    flat = {name: None if number is None else number[0] for name, number in numbers.items()}
    given = {name: column.flatten() if column.ndim == 2 else column[:, 0] for name, column in facts.given.items()}
    return replace(Facts(**flat), given=given, kept=facts.kept)


def _view_columns(views: Sequence[ViewRecord], like: torch.Tensor) -> Values:
    """Columns (K, 1, T) of the views that are read; of none, one with weight 0."""
    if not views:
        return dict.fromkeys(
            ("view_log_probs", "view_entropies", "view_weights"), torch.zeros_like(like)[None].detach()
        )
    return {
        "view_log_probs": torch.stack([_row(view.log_prob) for view in views]),
        "view_entropies": torch.stack([_row(view.entropy) for view in views]),
        "view_weights": torch.stack([torch.full_like(like, view.weight) for view in views]).detach(),
    }


def _row(numbers: Any) -> torch.Tensor:
    """(1, T) float64, or (1, 1) of one number."""
    return torch.as_tensor(numbers, dtype=torch.float64).reshape(1, -1)
