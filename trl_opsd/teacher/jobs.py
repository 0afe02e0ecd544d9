# SPDX-License-Identifier: Apache-2.0
"""What the teacher has to read, and which of it goes into one forward.

A plain forward holds rows of context and rollout. Rollouts that share a context are planned together: one forward over
their contexts, then forwards over the rollouts alone, on the contexts' KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ScoringJob:
    """One teacher context on one rollout.

    Attributes:
        context: token ids the teacher reads first.
        rollout: token ids of the part of the completion that is scored, as sampled.
        row: row of the batch the result is added to.
        anchor: weight in the anchor.
        direction: weight in the direction.
        view: place among the row's views that are read, or None.
    """

    context: list[int]
    rollout: list[int]
    row: int
    anchor: float
    direction: float
    view: int | None = None

    def __len__(self) -> int:
        return len(self.context) + len(self.rollout)


@dataclass(frozen=True)
class SharedBatch:
    """Contexts that are run once, and the rollouts that continue them.

    Attributes:
        contexts: distinct contexts of one forward.
        chunks: jobs of one forward each; every job's context is among `contexts`.
    """

    contexts: list[list[int]]
    chunks: list[list[ScoringJob]]

    @property
    def num_forwards(self) -> int:
        """Forwards of the model: one over the contexts and one per chunk."""
        return 1 + len(self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding left out."""
        return sum(map(len, self.contexts)) + sum(len(job.rollout) for chunk in self.chunks for job in chunk)


def padded_size(jobs: Sequence[ScoringJob]) -> int:
    """Tokens of the rectangle that holds the jobs' contexts, padded on the left, and rollouts, padded on the right."""
    return len(jobs) * (max(len(job.context) for job in jobs) + max(len(job.rollout) for job in jobs))


def plan_forwards(jobs: Sequence[ScoringJob], tokens_per_forward: int) -> list[list[ScoringJob]]:
    """Group jobs, longest first, so that each group's padded size stays within `tokens_per_forward` (at least one)."""
    batches: list[list[ScoringJob]] = []
    for job in sorted(jobs, key=len, reverse=True):
        if batches and padded_size([*batches[-1], job]) <= tokens_per_forward:
            batches[-1].append(job)
        else:
            batches.append([job])
    return batches


def group_by_context(jobs: Sequence[ScoringJob]) -> list[list[ScoringJob]]:
    """Jobs with equal contexts together, longest job first, the group with the longest job first."""
    groups: dict[tuple[int, ...], list[ScoringJob]] = {}
    for job in sorted(jobs, key=len, reverse=True):
        groups.setdefault(tuple(job.context), []).append(job)
    return list(groups.values())


def plan_shared(jobs: Sequence[ScoringJob], tokens_per_forward: int) -> tuple[list[SharedBatch], list[ScoringJob]]:
    """Plan the contexts that several jobs share, longest first.

    What a forward holds, its budget, is the cache of the batch's contexts and the chunk's rows of cached context and
    rollout. Several contexts go into one batch only where all their rollouts fit into one chunk.

    Returns:
        The batches, and the jobs that share with no other.
    """
    batches: list[list[list[ScoringJob]]] = []
    groups = group_by_context(jobs)
    for group in groups:
        if len(group) == 1:
            continue
        if batches and _held([*batches[-1], group]) <= tokens_per_forward:
            batches[-1].append(group)
        else:
            batches.append([group])
    shared = [
        SharedBatch(
            [group[0].context for group in batch],
            plan_forwards(_flat(batch), tokens_per_forward - _cached(batch)),
        )
        for batch in batches
    ]
    return shared, [group[0] for group in groups if len(group) == 1]


def _cached(groups: list[list[ScoringJob]]) -> int:
    return len(groups) * max(len(group[0].context) for group in groups)


def _held(groups: list[list[ScoringJob]]) -> int:
    return _cached(groups) + padded_size(_flat(groups))


def _flat(groups: list[list[ScoringJob]]) -> list[ScoringJob]:
    return [job for group in groups for job in group]
