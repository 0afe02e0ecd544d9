# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a batch's targets, with the batch first, so that TRL may shuffle and split them by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..losses import OutputHead, Shape, Target
from .jobs import ScoringJob

DEVICE_BYTES = 2**30  # of hidden states that wait on a GPU; more of them wait in host memory
_HIDDEN = ("anchor_hidden", "direction_hidden")
_EXTRA_HIDDEN = "extra_anchor_hidden"
_NUMBERS = ("view_log_probs", "view_entropies")


@dataclass
class TargetStates:
    """What the teacher says of every rollout of a batch.

    Attributes:
        anchor: (B, D, H) what every target starts from; H is 0 where views are only read.
        direction: (B, D, H) what moves it, or None where no context has a direction weight.
        numbers: (B, K, D, 2) log-probability of the sampled token and entropy, in nats, under each of K views that are
            read, or None where none is.
        weights: (B, K) of the views that are read, 0 where a row has fewer.
        num_tokens: tokens the teacher computed, padding left out.
        extra_anchor: (B, E, H) what the targets of extras are, or None where they have none.

    Rows of `numbers` and `weights` behind the B of `anchor` are those of extras.
    """

    anchor: torch.Tensor
    direction: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    num_tokens: int = 0
    extra_anchor: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        with_direction: bool = False,
        view_weights: Sequence[Sequence[float]] | None = None,
        num_view_tokens: int = 0,
        extra_shape: tuple[int, int, int] | None = None,
    ):
        """Zeros.

        Args:
            shape: (B, D, H) of the hidden states.
            dtype: float32 or float64.
            device: where all of it is kept.
            with_direction: whether there is a direction.
            view_weights: of each row the weights of its views that are read; None where none is.
            num_view_tokens: length of the numbers.
            extra_shape: (B, E, H) of the extras' targets; None without.
        """
        parts = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(1 + with_direction)]
        target = cls(parts[0], parts[1] if with_direction else None)
        if extra_shape is not None:
            target.extra_anchor = torch.zeros(extra_shape, dtype=dtype, device=device)
        if view_weights is not None:
            num_views = max(1, *map(len, view_weights), 1)
            padded = [[*weights, *[0.0] * (num_views - len(weights))] for weights in view_weights]
            target.weights = torch.tensor(padded, dtype=dtype, device=device).view(-1, num_views)
            target.numbers = torch.zeros(len(padded), num_views, num_view_tokens, 2, dtype=dtype, device=device)
        return target

    def add(self, job: ScoringJob, states: torch.Tensor) -> None:
        """Add a job's hidden states (len(rollout), H) to the parts it has a weight in.

        Where views are read, two more columns behind the H hold the numbers.
        """
        states, size = states.to(self.anchor.device), len(self.anchor)
        if job.row < size:
            parts, row = ((self.anchor, job.anchor), (self.direction, job.direction)), job.row
        else:
            parts, row = ((self.extra_anchor, job.anchor),), job.row - size
        for part, weight in parts:
            if weight:
                part[row, : len(job.rollout)] += weight * states[:, : part.size(2)]
        if job.view is not None:
            self.numbers[job.row, job.view, : len(job.rollout)] = states[:, -2:].to(self.numbers.dtype)

    def widen(self, length: int) -> None:
        """Add zeros behind the last position, up to `length` of them in all."""
        missing = length - self.anchor.size(1)
        for name in ("anchor", "direction") if missing else ():
            part = getattr(self, name)
            setattr(self, name, None if part is None else torch.nn.functional.pad(part, (0, 0, 0, missing)))

    def columns(self) -> dict[str, torch.Tensor]:
        """What a batch carries from scoring to the loss."""
        parts = zip(_HIDDEN, (self.anchor if self.anchor.size(2) else None, self.direction), strict=True)
        columns = {name: part for name, part in parts if part is not None}
        if self.extra_anchor is not None:
            columns[_EXTRA_HIDDEN] = self.extra_anchor
        if self.numbers is None:
            return columns
        size = len(self.anchor)
        for prefix, rows in (("", slice(size)), ("extra_", slice(size, None))):
            numbers = self.numbers[rows]
            if len(numbers):
                columns |= {f"{prefix}{name}": part for name, part in zip(_NUMBERS, numbers.unbind(-1), strict=True)}
                columns[f"{prefix}view_weights"] = self.weights[rows]
        return columns


def waits_in_host_memory(num_bytes: int) -> bool:
    """Whether the hidden states of a generation batch, `num_bytes` in all, wait for their micro-batches in host memory."""
    return num_bytes > DEVICE_BYTES


def offload_states(batch: dict[str, Any], num_batches: int) -> dict[str, torch.Tensor]:
    """A micro-batch's hidden states in host memory, from which a GPU can copy them without waiting; nothing if they may stay.

    Args:
        batch: one of a generation batch's `num_batches`.
        num_batches: alike, that wait together.
    """
    states = {name: batch[name] for name in (*_HIDDEN, _EXTRA_HIDDEN) if name in batch}
    if not waits_in_host_memory(num_batches * sum(hidden.nbytes for hidden in states.values())):
        return {}
    states = {name: hidden.cpu() for name, hidden in states.items()}
    return {name: hidden.pin_memory() for name, hidden in states.items()} if torch.cuda.is_available() else states


def read_target(batch: dict[str, Any], shape: Shape, head: OutputHead | None, device: torch.device) -> Target:
    """The target of a (micro-)batch that holds rows of `TargetStates.columns`.

    Args:
        batch: its hidden states may be in host memory.
        shape: how the direction enters now.
        head: of the teacher; None for the student's.
        device: of the loss.
    """
    parts = (batch[name].to(device, non_blocking=True) if name in batch else None for name in _HIDDEN)
    return Target(*parts, shape, head)


def read_extra_target(batch: dict[str, Any], head: OutputHead | None, device: torch.device) -> Target:
    """The target of a (micro-)batch's extras, as `read_target`: their anchor alone."""
    return Target(batch[_EXTRA_HIDDEN].to(device, non_blocking=True), head=head)
