# SPDX-License-Identifier: Apache-2.0
"""One of TRL's micro-batches on its way to the loss: which positions it has, what it counts, and its loss from hidden states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._trl.rollouts import prompt_width
from ..losses import Facts, OutputHead, Target
from ..losses.tiles import nonzero_positions
from ..methods import Method
from ..monitoring.diagnostics import Diagnostics
from ..teacher.contexts import Moment
from ..teacher.states import offload_states, read_extra_target, read_target
from .columns import LossColumns, given_advantages
from .step_loss import Result, StepLoss


def distilled_mask(
    batch: Mapping[str, Any], length: int | None, num_skipped: int, ignored: set[int], has_views: list[bool]
) -> torch.Tensor:
    """(B, D), 1 on the positions of a rollout that are distilled: its own tokens, never a tool's.

    Args:
        batch: TRL's.
        length: tokens of a rollout that are distilled; None for all.
        num_skipped: first tokens that are not.
        ignored: tokens of the vocabulary that are not.
        has_views: of each row, whether a teacher reads it.
    """
    mask = batch["completion_mask"]
    mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask.clone()
    mask = mask[:, :length]
    mask[:, :num_skipped] = 0
    if ignored:
        mask[torch.isin(batch["completion_ids"][:, :length], torch.tensor(sorted(ignored), device=mask.device))] = 0
    mask[~torch.tensor(has_views, device=mask.device)] = 0
    return mask


def positions(batch: Mapping[str, Any], method: Method, steps_waiting: int) -> dict[str, torch.Tensor]:
    """Where a micro-batch has tokens that count, which a GPU is asked for once; and its states where they are to wait.

    Args:
        batch: with the columns of `TargetMaker.columns`.
        method: whose loss is taken.
        steps_waiting: micro-batches that wait for their step at a time.
    """
    mask, beside = batch["distillation_mask"].flatten(), {}
    if "extra_mask" in batch:
        beside["extra_rows"] = nonzero_positions(batch["extra_mask"].any(dim=1))
    if method.extra_term is not None:
        beside["extra_positions"] = nonzero_positions(batch["extra_mask"])
    elif "extra_mask" in batch:
        mask = torch.cat([mask, batch["extra_mask"].flatten()])
    return {"distilled_positions": nonzero_positions(mask)} | beside | offload_states(batch, steps_waiting)


def count_items(batch: Mapping[str, Any], method: Method, reduction: str) -> dict[str, torch.Tensor]:
    """0-d numbers of what a micro-batch's losses average over, by the key that gets the global count."""

    def items(mask: torch.Tensor) -> torch.Tensor:
        return mask.sum() if reduction == "token" else mask.any(dim=1).sum()

    counts = {"num_loss_items": items(batch["distillation_mask"]), "num_loss_rows": batch["rollout_trained"].sum()}
    if method.extra_term is not None:
        counts["num_extra_items"] = items(batch["extra_mask"])
    return counts


@dataclass
class MicroBatchLoss:
    """What a forward of the student calls with its hidden states and head: the loss of a micro-batch, and numbers for the log.

    Attributes:
        step_loss: of the method.
        batch: the micro-batch.
        columns: of it.
        teacher_head: that reads the target's states; None for the student's.
        moment: of the step.
        measures_clip: see `StepLoss.of_states`.
    """

    step_loss: StepLoss
    batch: Mapping[str, Any]
    columns: LossColumns
    teacher_head: OutputHead | None
    moment: Moment
    measures_clip: bool

    def __call__(self, hidden: torch.Tensor, head: OutputHead) -> Result:
        """The loss from hidden states of the student's rows (B + k, S, H)."""
        states, extras = self._states(hidden)
        if self.columns.extra_mask is not None:
            states = torch.cat([states, extras])
        loss, stats = self.step_loss.of_states(
            states, head, self._target(), self.columns, self.moment, measures_clip=self.measures_clip
        )
        if self.columns.term is None:
            return loss, stats
        target = self._extra_target()
        term, terms = self.step_loss.of_extras(extras, head, target, self.columns.term, self.moment)
        return loss + term, stats | {"extra_terms": terms}

    def advantages(self, facts: Facts) -> torch.Tensor:
        """(B, T): the method's where it has some, TRL's times `reward_weight` elsewhere."""
        columns, settings, batch = self.columns, self.step_loss.settings, self.batch
        whole = given_advantages(batch, settings).expand(batch["completion_ids"].shape).clone()
        own = self.step_loss.method.advantages(columns.by_row(facts), settings, self.moment).detach()
        part = whole[:, : columns.shape[1]]
        part.copy_(torch.where(columns.rows["mask"] != 0, own.to(part.dtype), part))
        return whole

    def log(self, stats: dict[str, torch.Tensor], diagnostics: Diagnostics) -> None:
        """Add what `__call__` returned beside the loss to the log."""
        batch, mask, stats = self.batch, self.batch["distillation_mask"], dict(stats)
        products = stats.pop("clip_products", None)
        if "extra_terms" in stats:
            diagnostics.add_mean("extras/loss", stats.pop("extra_terms"), batch["extra_mask"].flatten())
        if "reference_divergence" in stats:
            distance = stats.pop("reference_divergence")[: self.columns.num_own]
            diagnostics.add_mean("reference_divergence", distance, mask.flatten())
        values = {name: value[: self.columns.num_own].view(mask.shape) for name, value in stats.items()}
        diagnostics.add(values, mask, batch["rollout_index"], products, batch["rollout_outcome"])

    def _states(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B D, H) that predict rollouts, and (B E, H) that predict extras, 0 where there is none."""
        batch, (size, length) = self.batch, self.columns.shape
        first = prompt_width(batch) - 1
        states = hidden[:size, first : first + length].flatten(0, 1)
        if "extra_mask" not in batch:
            return states, states[:0]
        width = batch["extra_mask"].size(1)
        extras = hidden.new_zeros(size, width, hidden.size(-1))
        extras = extras.index_copy(0, batch["extra_rows"], hidden[size:, first : first + width])
        return states, extras.flatten(0, 1)

    def _target(self) -> Target | None:
        """The target of the N positions, zeros for extras; None where the method has none."""
        method, extra_mask = self.step_loss.method, self.columns.extra_mask
        if not method.has_target:
            return None
        shape = method.shape(self.step_loss.settings, self.moment.step)
        target = read_target(self.batch, shape, self.teacher_head, self.columns.weights.device)
        return target if extra_mask is None else target.widened(extra_mask.numel())

    def _extra_target(self) -> Target | None:
        """The target of the extras; None where they have none."""
        if not self.step_loss.method.extras_have_target:
            return None
        return read_extra_target(self.batch, self.teacher_head, self.columns.weights.device)
