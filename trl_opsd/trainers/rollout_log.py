# SPDX-License-Identifier: Apache-2.0
"""What the log says of a generation batch's rollouts."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..monitoring.markers import count_markers
from ..monitoring.repetition import count_repeated, is_loop


class RolloutCounts(NamedTuple):
    """What is counted of this rank's rollouts.

    Attributes:
        markers: reflection markers of each.
        num_tokens: of all.
        repeated, grams: n-grams that stood in the same rollout before, and all of them.
        loops: rollouts that end in a loop.
    """

    markers: list[int]
    num_tokens: int
    repeated: int
    grams: int
    loops: int


def count_rollouts(rollout_ids: Sequence[list[int]], texts: Sequence[str]) -> RolloutCounts:
    """Count of rollouts what the log says of them; needs nothing of other ranks, so it may run in a thread.

    Args:
        rollout_ids: tokens of each rollout.
        texts: of each.
    """
    markers = [count_markers(text) for text in texts]
    return RolloutCounts(markers, sum(map(len, rollout_ids)), *count_repeated(rollout_ids), sum(map(is_loop, texts)))


def measure_rollouts(
    counts: RolloutCounts, shortened: Sequence[bool], num_teacher_tokens: int, accelerator: Any
) -> dict[str, float]:
    """Means over the rollouts of all ranks; a collective.

    Args:
        counts: of this rank's.
        shortened: of each, whether a text in its contexts was.
        num_teacher_tokens: that the teacher computed.
        accelerator: of the trainer.
    """
    sums = [sum(counts.markers), counts.num_tokens, sum(shortened), len(shortened), num_teacher_tokens]
    sums = [*sums, counts.repeated, counts.grams, counts.loops]
    sums = torch.tensor(sums, dtype=torch.float64)
    sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return {
        "reflection_markers_per_1000": 1000 * sums[0] / max(sums[1], 1),
        "completions/repetition": sums[5] / max(sums[6], 1),
        "completions/looping_ratio": sums[7] / sums[3],
        "teacher/solution_shortened": sums[2] / sums[3],
        "teacher/tokens_computed": sums[4],
    }


def warn_of_masked_rollouts(completion_mask: torch.Tensor, args: Any, accelerator: Any) -> None:
    """Warn where `mask_truncated_completions` leaves nothing of a generation batch; a collective."""
    kept = accelerator.reduce(completion_mask.any(dim=1).sum(), reduction="sum")
    if not kept and accelerator.is_main_process:
        warnings.warn(
            "Every rollout of a generation batch was cut at its length limit, and mask_truncated_completions=True "
            "leaves them all out: the batch trains on nothing. Raise max_completion_length "
            f"({args.max_completion_length}), or set mask_truncated_completions=False.",
            stacklevel=2,
        )
