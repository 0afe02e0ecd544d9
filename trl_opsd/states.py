# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a batch's targets, laid out so that TRL may shuffle and split them by row.

A linear head needs the weighted sum of a row's views, (B, D, H) however many there are. A head that caps its logits
caps every view before they are added, so there the views are kept apart, (B, K, D, H) with weights (B, K).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .jobs import ScoringJob
from .losses.views import Views


@dataclass
class PartStates:
    """Anchor or direction of every row of a batch.

    Attributes:
        part: "anchor" or "direction".
        hidden: (B, D, H) weighted sum of a row's views; (B, K, D, H) the views themselves where they are kept apart.
        weights: (B, K) of the views, 0 behind a row's last; None for the sum.
    """

    part: str
    hidden: torch.Tensor
    weights: torch.Tensor | None = None

    def __post_init__(self):
        self._num_views: Counter[int] = Counter()

    def add(self, job: ScoringJob, states: torch.Tensor) -> None:
        """Add a job's hidden states (len(rollout), H) with its weight in this part; nothing where that is 0."""
        weight = getattr(job, self.part)
        if not weight:
            return
        if self.weights is None:
            self.hidden[job.row, : len(job.rollout)] += weight * states.to(self.hidden.device)
            return
        place = job.row, self._num_views[job.row]
        self.hidden[place][: len(job.rollout)] = states
        self.weights[place] = weight
        self._num_views[job.row] += 1


@dataclass
class TargetStates:
    """Hidden states of a batch's targets.

    Attributes:
        anchor_states: what every target starts from.
        direction_states: what shifts it, or None where no context has a direction weight.
        num_tokens: tokens the teacher computed, padding left out.
    """

    anchor_states: PartStates
    direction_states: PartStates | None
    num_tokens: int = 0

    @property
    def anchor(self) -> torch.Tensor:
        """(B, D, H), or (B, K, D, H) where views are kept apart."""
        return self.anchor_states.hidden

    @property
    def direction(self) -> torch.Tensor | None:
        """As `anchor`; None where no context has a direction weight."""
        return None if self.direction_states is None else self.direction_states.hidden

    def add(self, job: ScoringJob, states: torch.Tensor) -> None:
        """Add a job's hidden states (len(rollout), H) to the parts it has a weight in."""
        for part in (self.anchor_states, self.direction_states):
            if part is not None:
                part.add(job, states)

    def columns(self) -> dict[str, torch.Tensor]:
        """What a batch carries from scoring to `read_views`; every tensor has the batch first."""
        parts = [part for part in (self.anchor_states, self.direction_states) if part is not None]
        columns = {f"{part.part}_hidden": part.hidden for part in parts}
        return columns | {f"{part.part}_weights": part.weights for part in parts if part.weights is not None}


def empty_targets(
    jobs: Sequence[ScoringJob],
    shape: tuple[int, int, int],
    *,
    with_direction: bool,
    linear_head: bool,
    **tensor_settings: Any,
) -> TargetStates:
    """Zeros with room for the jobs' views.

    Args:
        jobs: all that will be added.
        shape: (B, D, H).
        with_direction: whether there is a direction.
        linear_head: whether views may be summed as hidden states.
        **tensor_settings: dtype and device.
    """

    def make(part: str, apart: bool) -> PartStates:
        if not apart:
            return PartStates(part, torch.zeros(shape, **tensor_settings))
        num_views = max(Counter(job.row for job in jobs if getattr(job, part)).values(), default=1)
        hidden = torch.zeros(shape[0], num_views, *shape[1:], **tensor_settings)
        return PartStates(part, hidden, hidden.new_zeros(hidden.shape[:2]))

    anchor = make("anchor", apart=not linear_head and not _one_view_a_row(jobs))
    return TargetStates(anchor, make("direction", apart=not linear_head) if with_direction else None)


def _one_view_a_row(jobs: Sequence[ScoringJob]) -> bool:
    """Whether every row's anchor is one view of weight 1, which is its own sum under any head."""
    anchors = [job for job in jobs if job.anchor]
    return all(job.anchor == 1 for job in anchors) and len({job.row for job in anchors}) == len(anchors)


def offload_states(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A micro-batch's hidden states in host memory, from which a GPU can copy them without waiting."""
    names = [name for name in ("anchor_hidden", "direction_hidden") if name in batch]
    states = {name: batch[name].cpu() for name in names}
    return {name: hidden.pin_memory() for name, hidden in states.items()} if torch.cuda.is_available() else states


def read_views(batch: dict[str, Any], part: str, device: torch.device) -> Views | None:
    """Anchor or direction of a (micro-)batch as the loss takes it.

    Args:
        batch: holds rows of `TargetStates.columns`.
        part: "anchor" or "direction".
        device: of the loss; the hidden states may be in host memory.

    Returns:
        (B D, H); pairs of weights (B D,) and hidden states (B D, H) where views are kept apart; None without the part.
    """
    hidden, weights = batch.get(f"{part}_hidden"), batch.get(f"{part}_weights")
    if hidden is None:
        return None
    hidden = hidden.to(device, non_blocking=True)
    if weights is None:
        return hidden.flatten(0, 1)
    views = zip(weights.to(device).unbind(1), hidden.unbind(1), strict=True)
    return [(weight.repeat_interleave(view.size(1)), view.flatten(0, 1)) for weight, view in views]
