# SPDX-License-Identifier: Apache-2.0
"""What the log says of a generation batch's rollouts."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..monitoring.markers import count_markers
from ..monitoring.repetition import count_repeated, is_loop


def measure_rollouts(
    rollout_ids: Sequence[list[int]],
    texts: Sequence[str],
    shortened: Sequence[bool],
    num_teacher_tokens: int,
    accelerator: Any,
) -> tuple[dict[str, float], list[int]]:
    """Means over the rollouts of all ranks, and the reflection markers in each of this rank's; a collective.

    Args:
        rollout_ids: tokens of each rollout.
        texts: of each.
        shortened: of each, whether a text in its contexts was.
        num_teacher_tokens: that the teacher computed.
        accelerator: of the trainer.
    """
    markers = [count_markers(text) for text in texts]
    repeated = count_repeated(rollout_ids)
    sums = [sum(markers), sum(map(len, rollout_ids)), sum(shortened), len(texts), num_teacher_tokens, *repeated]
    sums.append(sum(map(is_loop, texts)))
    sums = torch.tensor(sums, dtype=torch.float64)
    sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    metrics = {
        "reflection_markers_per_1000": 1000 * sums[0] / max(sums[1], 1),
        "completions/repetition": sums[5] / max(sums[6], 1),
        "completions/looping_ratio": sums[7] / sums[3],
        "teacher/solution_shortened": sums[2] / sums[3],
        "teacher/tokens_computed": sums[4],
    }
    return metrics, markers


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
