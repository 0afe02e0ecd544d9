# SPDX-License-Identifier: Apache-2.0
"""Teacher forwards: hidden states of every context over its rollout, without logits and without gradients.

Each view adds its hidden states, with its weights, to the rollout's anchor and direction, which is all that a target
`W a + shape(W d)` needs: H numbers a position instead of V.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collators import left_pad, positions_from_mask
from .heads import OutputHead, head_function


@dataclass(frozen=True)
class ScoringJob:
    """One teacher context on one rollout.

    Attributes:
        context: token ids the teacher reads first.
        rollout: token ids of the part of the completion that is scored, as sampled.
        row: row of the batch the result is added to.
        anchor: weight in the anchor.
        direction: weight in the direction.
    """

    context: list[int]
    rollout: list[int]
    row: int
    anchor: float
    direction: float

    def __len__(self) -> int:
        return len(self.context) + len(self.rollout)


@dataclass
class TargetStates:
    """Hidden states of a batch's targets.

    Attributes:
        anchor: (B, D, H).
        direction: (B, D, H), or None where no context has a direction weight.
        num_tokens: tokens the teacher computed, padding left out.
    """

    anchor: torch.Tensor
    direction: torch.Tensor | None
    num_tokens: int


def plan_forwards(jobs: Sequence[ScoringJob], tokens_per_forward: int) -> list[list[ScoringJob]]:
    """Group jobs, longest first, so that each group's padded size stays within `tokens_per_forward` (at least one)."""
    batches: list[list[ScoringJob]] = []
    for job in sorted(jobs, key=len, reverse=True):
        if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= tokens_per_forward:
            batches[-1].append(job)
        else:
            batches.append([job])
    return batches


@torch.no_grad()
def score_contexts(
    run: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    jobs: Sequence[ScoringJob],
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    pad_id: int,
    tokens_per_forward: int,
    with_direction: bool,
    max_over_ranks: Callable[[int], int] = lambda count: count,
) -> TargetStates:
    """Run the teacher over all jobs and add up the targets' hidden states.

    Args:
        run: from ids (b, S), mask (b, S) and a length to the hidden states (b, length, H) that predict the last
            `length` ids; see `completion_states`.
        jobs: what to score.
        shape: (B, D, H): rows, scored length and hidden size of the result.
        dtype: of the result.
        device: of the inputs and the result.
        pad_id: padding token.
        tokens_per_forward: tokens, padding included, of one forward.
        with_direction: whether the result has a direction.
        max_over_ranks: makes every rank run the same number of forwards, which sharded engines need; a rank that
            has fewer runs an empty one.

    Returns:
        The anchor and direction; positions behind a rollout's end and rows without a context are zero.
    """
    # Added up in float32 (float64 for a float64 model): a target of one view keeps the model's own numbers.
    anchor = torch.zeros(*shape, device=device, dtype=dtype)
    direction = torch.zeros_like(anchor) if with_direction else None
    batches = plan_forwards(jobs, tokens_per_forward)
    for index in range(max_over_ranks(len(batches))):
        batch = batches[index] if index < len(batches) else [ScoringJob([pad_id], [pad_id], 0, 0.0, 0.0)]
        for job, hidden in zip(batch, _forward_batch(run, batch, pad_id, device), strict=True):
            for total, weight in ((anchor, job.anchor), (direction, job.direction)):
                if weight:
                    total[job.row, : len(job.rollout)] += weight * hidden
    return TargetStates(anchor, direction, sum(map(len, jobs)))


def _forward_batch(run, batch, pad_id, device) -> list[torch.Tensor]:
    """Hidden states (len(rollout), H) that predict each job's rollout."""
    contexts, context_mask = left_pad([job.context for job in batch], pad_id)
    length = max(len(job.rollout) for job in batch)
    rollouts = torch.full((len(batch), length), pad_id)
    rollout_mask = torch.zeros_like(rollouts)
    for row, job in enumerate(batch):
        rollouts[row, : len(job.rollout)] = torch.tensor(job.rollout)
        rollout_mask[row, : len(job.rollout)] = 1
    mask = torch.cat([context_mask, rollout_mask], dim=1).to(device)
    ids = torch.cat([contexts, rollouts], dim=1).to(device)
    hidden = run(ids, mask, length)
    return [states[: len(job.rollout)] for states, job in zip(hidden, batch, strict=True)]


def completion_states(
    model: torch.nn.Module,
    forward: Callable[..., Any],
    ids: torch.Tensor,
    mask: torch.Tensor,
    length: int,
    observe_head: Callable[[OutputHead], None] = lambda head: None,
) -> torch.Tensor:
    """Hidden states (B, length, H) that predict the last `length` tokens of `ids` (B, S), S > length.

    Args:
        model: the unwrapped, patched model (see `heads.attach_head_function`).
        forward: what runs it: the model itself or the engine around it.
        ids: (B, S) token ids.
        mask: (B, S), 1 on tokens.
        length: number of last tokens.
        observe_head: shown the output head while it is whole.
    """

    def keep(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        observe_head(head)
        return hidden[:, -length - 1 : -1]

    with head_function(model, keep) as request:
        forward(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask))
    return request.result
