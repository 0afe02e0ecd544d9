# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a batch's targets, with the batch first, so that TRL may shuffle and split them by row."""

from dataclasses import dataclass
from typing import Any

import torch

from ..losses import OutputHead, Shape, Target
from .jobs import ScoringJob

_COLUMNS = ("anchor_hidden", "direction_hidden")


@dataclass
class TargetStates:
    """Weighted sums of the teacher's views on every rollout of a batch.

    Attributes:
        anchor: (B, D, H) what every target starts from.
        direction: (B, D, H) what moves it, or None where no context has a direction weight.
        num_tokens: tokens the teacher computed, padding left out.
    """

    anchor: torch.Tensor
    direction: torch.Tensor | None = None
    num_tokens: int = 0

    def add(self, job: ScoringJob, states: torch.Tensor) -> None:
        """Add a job's hidden states (len(rollout), H) to the parts it has a weight in."""
        states = states.to(self.anchor.device)
        for part, weight in ((self.anchor, job.anchor), (self.direction, job.direction)):
            if weight:
                part[job.row, : len(job.rollout)] += weight * states

    def widen(self, length: int) -> None:
        """Add zeros behind the last position, up to `length` of them in all."""
        missing = length - self.anchor.size(1)
        for name in ("anchor", "direction") if missing else ():
            part = getattr(self, name)
            setattr(self, name, None if part is None else torch.nn.functional.pad(part, (0, 0, 0, missing)))

    def columns(self) -> dict[str, torch.Tensor]:
        """What a batch carries from scoring to `read_target`."""
        parts = zip(_COLUMNS, (self.anchor, self.direction), strict=True)
        return {name: part for name, part in parts if part is not None}


def offload_states(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A micro-batch's hidden states in host memory, from which a GPU can copy them without waiting."""
    states = {name: batch[name].cpu() for name in _COLUMNS if name in batch}
    return {name: hidden.pin_memory() for name, hidden in states.items()} if torch.cuda.is_available() else states


def read_target(batch: dict[str, Any], shape: Shape, head: OutputHead | None, device: torch.device) -> Target:
    """The target of a (micro-)batch that holds rows of `TargetStates.columns`.

    Args:
        batch: its hidden states may be in host memory.
        shape: how the direction enters now.
        head: of the teacher; None for the student's.
        device: of the loss.
    """
    parts = (batch[name].to(device, non_blocking=True) if name in batch else None for name in _COLUMNS)
    return Target(*parts, shape, head)
