# SPDX-License-Identifier: Apache-2.0
"""What a sweep knows of every position, as the one argument of the functions that weigh a divergence or make a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .closed_form import Row


@dataclass(frozen=True)
class Facts:
    """Numbers of n positions in nats at the loss's temperature, each (n,), float32 or float64.

    Log-probabilities and entropies are those of the whole vocabulary, under a support too. -1e30 stands for the
    log-probability of a token that a bias of -inf rules out.

    Attributes:
        log_prob: of the sampled token under the student; None where no token ids were given.
        target_log_prob: of it under the target; None without token ids or without a target.
        student_entropy: >= 0.
        target_entropy: >= 0; None without a target, as the two divergences.
        divergence: over the support and under the floors, before the clip.
        clipped_divergence: after the clip; the same tensor where there is none.
        given: the caller's columns of these positions, (n,) or (K, n), and its 0-d tensors.
        target_top_entropy: of the target's likeliest tokens, see `Divergence.entropy_top_k`; None where that is.
        kept: where what is made of the facts is to be shown, see `keep`; None in training.
    """

    log_prob: torch.Tensor | None
    target_log_prob: torch.Tensor | None
    student_entropy: torch.Tensor
    target_entropy: torch.Tensor | None
    divergence: torch.Tensor | None
    clipped_divergence: torch.Tensor | None
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    target_top_entropy: torch.Tensor | None = field(default=None, kw_only=True)
    kept: dict[str, torch.Tensor] | None = field(default=None, kw_only=True, compare=False)

    @classmethod
    def of(cls, stats: torch.Tensor, given: Mapping[str, torch.Tensor], *, has_target: bool = True) -> Facts:
        """From what a sweep returned, (6, n), (8, n) or (9, n)."""
        samples = len(stats) > Row.LOG_PROB
        return cls(
            log_prob=stats[Row.LOG_PROB] if samples else None,
            target_log_prob=stats[Row.TARGET_LOG_PROB] if samples and has_target else None,
            student_entropy=stats[Row.STUDENT_ENTROPY],
            target_entropy=stats[Row.TARGET_ENTROPY] if has_target else None,
            divergence=stats[Row.UNCLIPPED] if has_target else None,
            clipped_divergence=stats[Row.CLIPPED] if has_target else None,
            given=given,
            target_top_entropy=stats[Row.TARGET_TOP_ENTROPY] if len(stats) > Row.TARGET_TOP_ENTROPY else None,
        )

    @property
    def log_prob_ratio(self) -> torch.Tensor:
        """(n,) u = log p(y) - log q(y) of target and student; its mean under the student is -KL(q || p).

        In a loss of facts it carries the gradient of `log_prob`: detach it where it is a coefficient.
        """
        return self.target_log_prob - self.log_prob

    def keep(self, name: str, values: Any) -> Any:
        """`values` as they are, such as a gate; the inspector, which alone keeps them, shows them under the name in words.

        Args:
            name: of what they are, in a word or a few.
            values: a number, or a tensor that spreads to the positions, with a dimension before them where there are several.
        """
        if self.kept is not None:
            self.kept[name] = torch.as_tensor(values).detach()
        return values


def columns_at(given: Mapping[str, torch.Tensor] | None, places: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """The columns (N,) or (K, N) at some of their positions, (n,) or (K, n), detached; 0-d tensors as they are."""
    detached = {name: column.detach() for name, column in (given or {}).items()}
    return {name: column if column.ndim == 0 else column[..., places] for name, column in detached.items()}


def check_columns(token_ids: torch.Tensor | None, given: Mapping[str, torch.Tensor] | None, size: int) -> None:
    """Refuse token ids and columns that do not have `size` positions.

    Raises:
        ValueError: that names the column and its shape.
    """
    columns = {} if token_ids is None else {"token_ids": token_ids}
    columns |= {f"given[{name!r}]": column for name, column in (given or {}).items() if column.ndim}
    for name, column in columns.items():
        if column.shape[-1] != size or column.ndim > (1 if name == "token_ids" else 2):
            shapes = "(N,)" if name == "token_ids" else "(N,), (K, N) or ()"
            raise ValueError(f"{name} has shape {tuple(column.shape)}; pass {shapes} with N = {size} positions.")
