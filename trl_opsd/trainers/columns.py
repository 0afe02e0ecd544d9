# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch knows of its tokens, from columns of a batch to flat columns of the loss and back to rows."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..losses import Facts, sampled_divergence, token_weights, view_shares
from ..methods import RowFacts

_VIEWS = ("view_log_probs", "view_entropies", "view_weights")


@dataclass
class LossColumns:
    """Columns of N = B x D positions of rollouts, and of the B x E of extras behind them or in `term`.

    Attributes:
        shape: (B, D).
        weights: (N,) of the reduction; 0 on positions that do not count.
        row_weights: (B,) of a loss with one number a rollout.
        token_ids: (N,) sampled tokens.
        rows: columns (B, D) of the rollouts by name.
        views: columns (K, B, D) of the rollouts' views by name; empty where none is read.
        extra_mask: (B, E), nonzero on tokens of extras; None without.
        extra_views: columns (K, B, E) of the extras' views by name.
        positions: (n,) of the N that count, where it is known.
        term: columns of the extras alone, as rows (B, E), where they have a term of their own.
    """

    shape: torch.Size
    weights: torch.Tensor
    row_weights: torch.Tensor
    token_ids: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    views: Mapping[str, torch.Tensor]
    extra_mask: torch.Tensor | None = None
    extra_views: Mapping[str, torch.Tensor] | None = None
    positions: torch.Tensor | None = None
    term: "LossColumns | None" = None

    @classmethod
    def of_batch(
        cls,
        batch: Mapping[str, Any],
        settings: Any,
        *,
        num_processes: int,
        reads_old: bool,
        extras_apart: bool = False,
    ):
        """Columns of a micro-batch.

        Args:
            batch: with TRL's columns, those of `TargetMaker.columns` and the counts of the optimizer step.
            settings: reads `loss_reduction` and `reward_weight`.
            num_processes: engines average gradients over ranks, so each rank divides by its share of the global count.
            reads_old: `old_per_token_logps` are real where the batch has them.
            extras_apart: extras have a term of their own.
        """
        mask = batch["distillation_mask"]
        extra_mask = None if extras_apart else batch.get("extra_mask")
        items, rows = (batch[name].clamp(min=1) / num_processes for name in ("num_loss_items", "num_loss_rows"))
        weights = token_weights(mask, reduction=settings.loss_reduction, denominator=items).flatten()
        tokens = batch["completion_ids"][:, : mask.size(1)].flatten()
        if extra_mask is not None:
            weights = torch.cat([weights, weights.new_zeros(extra_mask.numel())])
            tokens = torch.cat([tokens, batch["extra_ids"].flatten()])
        known = {
            "mask": mask.float(),
            "advantage": given_advantages(batch, settings)[:, : mask.size(1)].expand(mask.shape),
            "reward": batch["rollout_reward"].unsqueeze(1).expand(mask.shape),
            "length": batch["rollout_length"].unsqueeze(1).expand(mask.shape),
            "engine_weight": engine_weights(batch, mask),
        }
        if "rollout_mark" in batch:
            known["mark"] = batch["rollout_mark"][:, : mask.size(1)]
        if reads_old and batch.get("old_per_token_logps") is not None:
            known["old_log_prob"] = batch["old_per_token_logps"][:, : mask.size(1)]
        return cls(
            shape=mask.shape,
            weights=weights,
            row_weights=batch["rollout_trained"].float() / rows,
            token_ids=tokens,
            rows=known,
            views=view_columns(batch, mask.size(1)),
            extra_mask=extra_mask,
            extra_views=None if extra_mask is None else view_columns(batch, extra_mask.size(1), "extra_"),
            positions=batch.get("distilled_positions"),
            term=cls.of_extras(batch, settings, num_processes=num_processes) if extras_apart else None,
        )

    @classmethod
    def of_extras(cls, batch: Mapping[str, Any], settings: Any, *, num_processes: int):
        """Columns of the extras of a micro-batch, as its rows; arguments as in `of_batch`."""
        mask = batch["extra_mask"]
        items = batch["num_extra_items"].clamp(min=1) / num_processes
        weights = token_weights(mask, reduction=settings.loss_reduction, denominator=items).flatten()
        return cls(
            shape=mask.shape,
            weights=weights,
            row_weights=weights.new_zeros(len(mask)),
            token_ids=batch["extra_ids"].flatten(),
            rows={"mask": mask.float()},
            views=view_columns(batch, mask.size(1), "extra_"),
            positions=batch.get("extra_positions"),
        )

    @classmethod
    def of_divergence(cls, weights: torch.Tensor):
        """Of positions (N,) that only their weight is known of: enough for a divergence."""
        return cls(
            weights[None].shape, weights, weights.new_ones(1), torch.zeros_like(weights, dtype=torch.long), {}, {}
        )

    @property
    def num_own(self) -> int:
        """B x D, positions of rollouts."""
        return self.shape.numel()

    def given(self) -> dict[str, torch.Tensor]:
        """The columns flat, (N,) and (K, N), with zeros where an extra has none."""
        size = len(self.token_ids) - self.num_own
        flat = {name: column.flatten() for name, column in self.rows.items()}
        flat |= {name: column.flatten(1) for name, column in self.views.items()}
        return {name: torch.nn.functional.pad(column, (0, size)) for name, column in flat.items()}

    def by_row(self, facts: Facts) -> RowFacts:
        """The facts of all positions (N,) as rows: (B, D), views (K, B, D), and those of extras likewise."""
        own = self._cut(facts, slice(self.num_own), self.shape)
        given = {**self.rows, **self.views}
        given.setdefault("old_log_prob", own["log_prob"].detach())
        extra = None
        if self.extra_mask is not None:
            columns = self._cut(facts, slice(self.num_own, None), self.extra_mask.shape)
            extra = RowFacts(**columns, given={"mask": self.extra_mask, **(self.extra_views or {})})
        return RowFacts(**own, given=given, extra=extra)

    def view_values(self, log_prob: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the log holds of views that are read, (N,): their mean entropy, and `losses.sampled_divergence`.

        Args:
            log_prob: (N,) of the sampled tokens under the student.
        """
        given, log_prob = self.given(), log_prob.detach()
        divergence = sampled_divergence(log_prob, given["view_log_probs"], given["view_weights"])
        entropy = (view_shares(given["view_weights"]) * given["view_entropies"]).sum(0)
        return {"divergence": divergence.to(log_prob.dtype), "target_entropy": entropy}

    @staticmethod
    def _cut(facts: Facts, places: slice, shape: torch.Size) -> dict[str, Any]:
        names = [field.name for field in fields(Facts) if field.name != "given"]
        columns = {name: getattr(facts, name) for name in names}
        return {name: None if column is None else column[places].view(shape) for name, column in columns.items()}


def given_advantages(batch: Mapping[str, Any], settings: Any) -> torch.Tensor:
    """TRL's advantages times `reward_weight`, (B, 1) or (B, T); 0 where the weight is, whatever they are."""
    advantages = batch["advantages"] if batch["advantages"].ndim == 2 else batch["advantages"].unsqueeze(1)
    weight = settings.reward_weight
    return (advantages * weight if weight else torch.zeros_like(advantages)).float()


def engine_weights(batch: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """(B, D) TRL's importance weights of the trainer's policy against the engine that sampled; 1 where it takes none."""
    ratio = batch.get("importance_sampling_ratio")  # (B, T), or (B, 1) of a sequence
    return (
        mask.new_ones(mask.shape, dtype=torch.float32) if ratio is None else ratio[:, : mask.size(1)].expand(mask.shape)
    )


def view_columns(batch: Mapping[str, Any], length: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """(K, B, length) columns of the views that were read of a batch's rollouts, or of its extras (`prefix`)."""
    if f"{prefix}view_log_probs" not in batch:
        return {}
    log_probs, entropies, weights = (batch[f"{prefix}{name}"] for name in _VIEWS)
    numbers = [_to_length(numbers, length).transpose(0, 1) for numbers in (log_probs, entropies)]
    weights = weights.T.unsqueeze(-1).expand_as(numbers[0])
    return dict(zip(_VIEWS, (*numbers, weights), strict=True))


def _to_length(numbers: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(numbers[..., :length], (0, max(0, length - numbers.size(-1))))
