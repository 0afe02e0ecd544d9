# SPDX-License-Identifier: Apache-2.0
"""The loss of a micro-batch from the student's hidden states, inside the forward of its engine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..losses import (
    Divergence,
    Facts,
    OutputHead,
    Target,
    clip_gradient_products,
    fused_divergence,
    fused_fact_loss,
)
from ..methods import Method
from ..model.heads import head_function
from ..monitoring.diagnostics import log_values
from ..teacher.contexts import Moment
from ..teacher.prompts import positions_from_mask
from .columns import LossColumns

Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


class StepLoss:
    """A method's loss, with the settings it is taken under.

    Args:
        model: the student, unwrapped and patched.
        method: whose loss it is.
        settings: `SelfDistillationSettings`.
        num_tokens: rows of the head that are compared; None for all.
    """

    def __init__(self, model: torch.nn.Module, method: Method, settings: Any, num_tokens: int | None):
        self.model, self.method, self.settings, self.num_tokens = model, method, settings, num_tokens
        self.divergence: Divergence = settings.loss_divergence()

    def in_forward(
        self, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, function: Callable
    ) -> tuple[torch.Tensor, Any]:
        """Loss and numbers that `function` returns from the student's hidden states, inside the engine's forward.

        Args:
            model: the student, as the engine wraps it.
            ids: (B, S) token ids, padded on the left.
            mask: (B, S), 1 on tokens.
            function: see `model.heads.head_function`.
        """
        with head_function(self.model, function) as request:
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask))
        # The loss that came through the engine's forward, not the one inside it: output hooks may have wrapped it,
        # and rounded it (FSDP2's mixed precision): the value is the one inside.
        loss, numbers = output["loss"], request.result[1]
        return loss + (request.result[0] - loss).detach(), numbers

    def of_states(
        self,
        states: torch.Tensor,
        head: OutputHead,
        target: Target | None,
        columns: LossColumns,
        moment: Moment,
        *,
        measures_clip: bool,
    ) -> Result:
        """The loss of the student's states (N, H), and numbers for the log.

        Args:
            states: that predict the tokens of `columns`.
            head: of the student.
            target: of the N positions; None where views are only read.
            columns: what else is known of the positions.
            moment: of the step.
            measures_clip: also measure how far the clipped gradient agrees with the unclipped one.

        Returns:
            The loss, and values (N,) by name; with `measures_clip` also `clip_products` (3,).
        """
        settings = {"divergence": self.divergence, "num_tokens": self.num_tokens, "positions": columns.positions}
        numbers = {}
        if measures_clip and target is not None and self.divergence.clip is not None:
            # At the strength that a growing target ends with: the clip cuts nothing of a target close to the student.
            last = replace(target, shape=self.method.shape(self.settings, self.settings.max_steps))
            numbers["clip_products"] = clip_gradient_products(
                states, head, last, token_weights=columns.weights, **settings
            )
        if self.method.loss is None and self.method.advantages is None:
            loss, stats = self._weighed(states, head, target, columns, moment, settings)
            return loss, log_values(stats) | numbers
        settings |= {"token_ids": columns.token_ids, "given": columns.given()}
        if self.method.pointwise:
            loss, stats, log_prob = self._by_token(states, head, target, columns, moment, settings)
        else:
            loss, stats, facts = self._of_facts(states, head, target, columns, moment, settings)
            numbers |= {"facts": facts} if self.method.advantages is not None else {}
            log_prob = facts.log_prob
        values = log_values(stats)
        if self.method.target_is_reference:
            nothing = torch.zeros_like(values["divergence"])
            values |= {"reference_divergence": values["divergence"], "top_token_agreement": nothing}
        if target is None or self.method.target_is_reference:
            values |= columns.view_values(log_prob)
        return loss, values | numbers

    def of_extras(
        self, states: torch.Tensor, head: OutputHead, target: Target | None, columns: LossColumns, moment: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The method's term of extras from their states (N, H), and its value on each of the N tokens before its weight.

        Args:
            states, head, moment: as in `of_states`.
            target: of the N tokens; None without.
            columns: `LossColumns.term`.
        """
        term = self.method.extra_term
        settings = {"num_tokens": self.num_tokens, "positions": columns.positions}
        settings["divergence"] = Divergence(temperature=self.settings.loss_temperature)
        if term.divergence is not None:
            settings["divergence"] = term.divergence(self.settings)
        factor = term.weight(self.settings)
        if term.loss is None:
            loss, stats = fused_divergence(states, head, target, token_weights=columns.weights * factor, **settings)
            return loss, stats.loss
        seen: list[torch.Tensor] = []

        def loss_of(facts: Facts) -> torch.Tensor:
            terms = term.loss(columns.by_row(facts), self.settings, moment)
            if terms.ndim != 2:
                raise ValueError(
                    f"{self.method.name}: extra_term's loss has shape {tuple(terms.shape)}; give terms (B, E)."
                )
            seen.append(terms.detach().flatten())
            return factor * self._reduced(terms, columns)

        settings |= {"token_ids": columns.token_ids, "given": columns.given()}
        return fused_fact_loss(states, head, target, loss_of=loss_of, **settings)[0], seen[0]

    def _weighed(self, states, head, target, columns, moment, settings):
        rule = self.method.token_weight
        if rule is not None:

            def weight_of(facts: Facts) -> torch.Tensor:
                return rule(_with_old(facts), self.settings, moment)

            settings = settings | {"token_ids": columns.token_ids, "given": columns.given(), "weight_of": weight_of}
        return fused_divergence(states, head, target, token_weights=columns.weights, **settings)

    def _of_facts(self, states, head, target, columns, moment, settings):
        """The method's loss of facts, 0 where it gives advantages alone; the diagnostics; and the facts."""
        seen: list[Facts] = []

        def loss_of(facts: Facts) -> torch.Tensor:
            seen.append(facts)
            if self.method.loss is None:
                return facts.log_prob.new_zeros(())
            return self._reduced(self.method.loss(columns.by_row(facts), self.settings, moment), columns)

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method.loss is not None):
            loss, stats = fused_fact_loss(states, head, target, loss_of=loss_of, **settings)
        return loss, stats, seen[0]

    def _by_token(self, states, head, target, columns, moment, settings):
        """The method's loss, token by token; the diagnostics; and the log-probabilities (N,) of the sampled tokens."""
        seen: list[torch.Tensor] = []

        def loss_of(facts: Facts) -> torch.Tensor:
            seen.append(facts.log_prob.detach())
            weight = facts.given["loss_weight"]
            terms = self.method.loss(_with_old(facts), self.settings, moment)
            if terms.shape != weight.shape:
                raise ValueError(
                    f"{self.method.name}: its pointwise loss has shape {tuple(terms.shape)} for facts {tuple(weight.shape)}; "
                    "give one."
                )
            return terms.masked_fill(weight == 0, 0.0) * weight

        settings = {**settings, "given": {**settings["given"], "loss_weight": columns.weights}}
        loss, stats = fused_fact_loss(states, head, target, loss_of=loss_of, pointwise=True, **settings)
        places = slice(None) if columns.positions is None else columns.positions
        log_prob = columns.weights.new_zeros(len(columns.weights), dtype=loss.dtype)
        log_prob[places] = torch.cat([log_prob.new_zeros(0), *seen])
        return loss, stats, log_prob

    def _reduced(self, terms: torch.Tensor, columns: LossColumns) -> torch.Tensor:
        weights = columns.row_weights if terms.ndim == 1 else columns.weights[: columns.num_own].view(columns.shape)
        if terms.shape != weights.shape:
            raise ValueError(
                f"{self.method.name}: its loss has shape {tuple(terms.shape)}; give terms (B, D) = {tuple(columns.shape)} "
                "or (B,) numbers."
            )
        return (terms.masked_fill(weights == 0, 0.0) * weights).sum()


def _with_old(facts: Facts) -> Facts:
    """Flat facts whose `old_log_prob` is the student's own where nothing older is known, as in `LossColumns.by_row`."""
    return replace(facts, given={"old_log_prob": facts.log_prob.detach(), **facts.given})
