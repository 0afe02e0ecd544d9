# SPDX-License-Identifier: Apache-2.0
"""A loss that is any function of the facts: policy gradients, ratios to an old policy, sums over sequences.

Differences to `fused.py`, whose divergence is weighed but not changed:
1. A first sweep finds the facts of all positions, without a gradient.
2. The function runs under autograd on these numbers alone.
3. A second sweep turns its derivatives into gradients: dL/dlog q(y) times (1[v = y] - q_v), and dL/dD times the
   divergence's own, in closed form. The target is projected again only where the second is not absent.

Where the loss of a position depends on that position's facts alone, the three happen tile by tile, and the student is
projected once.

All of it happens in the forward of one autograd function, as there: where parameters are sharded (ZeRO-3, FSDP2) the head
is gone by the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from .closed_form import FusedDiagnostics, finished, sampled_gradient
from .divergences import Divergence, compute_dtype
from .facts import Facts, check_columns, columns_at
from .fused import at_positions, check_shapes, evaluate
from .head import OutputHead
from .shapes import check_num_tokens
from .target import Target
from .tiles import Gradients, Tile, Work


def fused_fact_loss(
    student_hidden: torch.Tensor,
    head: OutputHead,
    target: Target | None,
    *,
    token_ids: torch.Tensor,
    loss_of: Callable[[Facts], torch.Tensor],
    given: Mapping[str, torch.Tensor] | None = None,
    divergence: Divergence | None = None,
    num_tokens: int | None = None,
    tile_tokens: int | None = None,
    positions: torch.Tensor | None = None,
    compiled: bool | str = False,
    pointwise: bool = False,
) -> tuple[torch.Tensor, FusedDiagnostics]:
    """The loss that a function makes of the facts of all positions, from final hidden states.

    Gradients go to `student_hidden` and to the weight and bias of `head`, and nowhere else. It projects the student twice
    and a target once, twice where the loss depends on the divergence; each once where `pointwise`.

    Args:
        student_hidden, head, target, num_tokens, tile_tokens, compiled: as in [`fused_divergence`]; without a target the
            facts hold none of it.
        token_ids: (N,) int64 sampled tokens, in [0, num_tokens) at the positions that count.
        loss_of: torch function of the facts (N,), differentiable in `log_prob` and in `divergence`; under a clip in
            `clipped_divergence` instead. Everything else is constant. It gives a scalar, or terms (N,) to be summed.
            Global counts that it divides by come in as numbers or in `given`.
        given: columns (N,) or (K, N), and 0-d tensors, that the facts hold.
        divergence: name, temperature, clip, support and floors; None is forward KL at temperature 1.
        positions: (n,) int64, the positions that count; None for all. The others are not projected: their facts are 0,
            their terms are not summed, and a function that gives a scalar must leave them out.
        pointwise: a term depends on the facts of its own position alone. `loss_of` is called once a tile, with the facts (n,)
            of some of the positions that count, in their order, and gives terms (n,).

    Returns:
        0-d loss, float32 or float64, and the diagnostics of every position, those of the divergence 0 without a target.

    Raises:
        ValueError: as [`fused_divergence`]; `loss_of` gives another shape, or a gradient to the unclipped divergence
            under a clip.
    """
    size, rule = len(student_hidden), divergence or Divergence()
    check_shapes(student_hidden, head, target, (size,), tile_tokens)
    check_columns(token_ids, given, size)
    head = head.first_rows(check_num_tokens(num_tokens, head.weight.shape[0]))
    if positions is None:
        positions = torch.arange(size, device=student_hidden.device)
    work = FactWork(
        **at_positions(student_hidden, head, target, rule, positions, token_ids),
        weights=student_hidden.new_ones(len(positions), dtype=compute_dtype(student_hidden.dtype)),
        given=columns_at(given, slice(None)),
        tile_tokens=tile_tokens,
        compiled=compiled,
        loss_of=loss_of,
        positions=positions,
        size=size,
        pointwise=pointwise,
    )
    return evaluate(work, student_hidden, head, positions)


@torch.no_grad()
def sampled_facts(
    student_hidden: torch.Tensor,
    head: OutputHead,
    token_ids: torch.Tensor,
    target: Target | None = None,
    *,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    num_tokens: int | None = None,
) -> Facts:
    """The facts of positions, without a gradient.

    Args:
        student_hidden, head, target, num_tokens: as in [`fused_divergence`].
        token_ids: (N,) int64, in [0, num_tokens).
        divergence: to the target; None is forward KL at `temperature`.
        temperature: divides the logits where no divergence is given, > 0.
    """
    seen: list[Facts] = []

    def keep(facts: Facts) -> torch.Tensor:
        seen.append(facts)
        return facts.student_entropy.sum()

    rule = divergence or Divergence(temperature=temperature)
    fused_fact_loss(
        student_hidden, head, target, token_ids=token_ids, loss_of=keep, divergence=rule, num_tokens=num_tokens
    )
    return seen[0]


@dataclass(frozen=True, kw_only=True)
class FactWork(Work):
    """What is constant in a loss of facts.

    Attributes:
        weights: ones.
        given: columns of all positions.
        loss_of: as in [`fused_fact_loss`].
        positions: (n,) of the positions that count.
        size: N, of all.
        pointwise: as in [`fused_fact_loss`].
    """

    loss_of: Callable[[Facts], torch.Tensor]
    positions: torch.Tensor
    size: int
    pointwise: bool = False

    def run(self, hidden: torch.Tensor, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and diagnostics (8, n) of hidden states (n, H); writes the gradients."""
        if self.pointwise:
            return self.run_by_tile(hidden, gradients)
        judge = partial(self.judge, with_gradient=False)
        stats = torch.cat([self.empty_stats(), *(self.sweep_tile(tile, judge) for tile in self.tiles(hidden))], dim=1)
        whole = stats.new_zeros(len(stats), self.size).index_copy_(1, self.positions, stats)
        loss, *slopes = self.differentiate(whole, self.given, self.positions)
        of_sampled, of_divergence = (None if slope is None else slope[self.positions] for slope in slopes)
        zero = torch.zeros_like(self.weights)
        if gradients.wanted:
            self.descend(hidden, zero if of_sampled is None else of_sampled, of_divergence, gradients)
        return loss, finished(stats, zero if of_divergence is None else of_divergence)

    def run_by_tile(self, hidden: torch.Tensor, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, where no term reads another position: the logits of a tile serve for facts and for the gradient."""
        judge = partial(self.judge, with_gradient=False)
        loss, all_stats = self.weights.new_zeros(()), [self.empty_stats()]
        of_sampled, of_divergence = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        for tile in self.tiles(hidden):
            all_stats.append(self.sweep_tile(tile, judge))
            given = columns_at(self.given, self.positions[tile.rows])
            part, sampled, own = self.differentiate(all_stats[-1], given, slice(None))
            loss = loss + part
            for whole, slope in ((of_sampled, sampled), (of_divergence, own)):
                if slope is not None:
                    whole[tile.rows] = slope
            if gradients.wanted:
                # The anchor's logits are the target's by now.
                again = tile._replace(direction=None) if own is not None else tile._replace(anchor=None, direction=None)
                self.descend_tile(again, of_sampled, None if own is None else of_divergence, hidden, gradients)
        return loss, finished(torch.cat(all_stats, dim=1), of_divergence)

    def differentiate(
        self, stats: torch.Tensor, given: Mapping[str, torch.Tensor], counted: torch.Tensor | slice
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss of facts, and its derivatives with respect to sampled log-probabilities and divergences, or None.

        Args:
            stats: (6 or 8, m) of m positions.
            given: columns of them.
            counted: which of them terms are summed over.
        """
        facts = Facts.of(stats, given, has_target=self.target is not None)
        leaves = {name: getattr(facts, name) for name in ("log_prob", "clipped_divergence", "divergence")}
        leaves = {name: fact.clone().requires_grad_() for name, fact in leaves.items() if fact is not None}
        if self.target is not None and self.divergence.clip is None:
            leaves["divergence"] = leaves["clipped_divergence"]
        with torch.enable_grad():
            loss = self._summed(self.loss_of(replace(facts, **leaves)), stats.size(1), counted)
        slopes = {}
        if loss.requires_grad:
            slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
        if self.divergence.clip is not None and slopes.get("divergence") is not None:
            raise ValueError(
                f"loss_of depends on the unclipped divergence under clip={self.divergence.clip!r}; let it read "
                "clipped_divergence, or set clip=None."
            )
        return loss.detach().to(stats.dtype), slopes.get("log_prob"), slopes.get("clipped_divergence")

    def _summed(self, terms: torch.Tensor, size: int, counted: torch.Tensor | slice) -> torch.Tensor:
        if terms.shape == (size,):
            return terms[counted].sum()
        if terms.ndim or self.pointwise:
            scalar = "" if self.pointwise else "a scalar or "
            raise ValueError(f"loss_of gave shape {tuple(terms.shape)}; give {scalar}terms ({size},).")
        return terms

    def descend(self, hidden, of_sampled, of_divergence, gradients: Gradients) -> None:
        """The second sweep: write the gradients of the two derivatives (n,), the second of which may be None."""
        for tile in self.tiles(hidden, with_target=of_divergence is not None):
            self.descend_tile(tile, of_sampled, of_divergence, hidden, gradients)

    def descend_tile(self, tile: Tile, of_sampled, of_divergence, hidden, gradients: Gradients) -> None:
        """The gradients of a tile, whose logits they replace; the derivatives are those of all n positions."""
        # The larger derivative is taken out of each position, as a weight is elsewhere: narrow products keep their range.
        scale = of_sampled.abs() if of_divergence is None else torch.maximum(of_sampled.abs(), of_divergence.abs())
        safe = scale.masked_fill(scale == 0, 1.0)
        shares = [None if slope is None else slope / safe for slope in (of_sampled, of_divergence)]
        self.sweep_tile(tile, partial(self.slope, shares))
        self.write_gradients(tile, scale[tile.rows], hidden, gradients)

    def slope(self, shares, rows: slice, student: torch.Tensor, target: torch.Tensor | None):
        """As `judge`, with the gradient of the loss; `shares` are the derivatives of all n positions."""
        gradient = sampled_gradient(student, self.token_ids[rows], shares[0][rows])
        if target is not None:
            _, own = self.judge(rows, student, target, with_gradient=True)
            gradient.addcmul_(own, shares[1][rows].unsqueeze(-1))
        return self.empty_stats(), gradient
