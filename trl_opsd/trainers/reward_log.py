# SPDX-License-Identifier: Apache-2.0
"""Rewards of a generation batch as methods and the log read them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..rewards import skips_errors


def scalar_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> list[float | None]:
    """One weighted reward per rollout, None where no function gave one.

    Args:
        rewards: (rollouts, functions), NaN where a function gave none.
        weights: (functions,).
    """
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    # TRL's rewards are float32: 0.7 would lie below a threshold of 0.7.
    return [None if value != value else float(f"{value:.7g}") for value in total.tolist()]


def count_errors(names: Sequence[str], functions: Sequence[Any], errors: Counter[str], accelerator: Any) -> dict:
    """Numbers of errors of the functions that skip theirs, over all ranks, for the log; a collective. Empties `errors`.

    Args:
        names, functions: of the rewards.
        errors: of this rank by name.
        accelerator: of the trainer.
    """
    names = [name for name, reward in zip(names, functions, strict=True) if skips_errors(reward)]
    if not names:
        return {}
    counts = torch.tensor([float(errors[name]) for name in names])
    counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()
    errors.clear()
    return {f"rewards/{name}/errors": count for name, count in zip(names, counts, strict=True)}
