# SPDX-License-Identifier: Apache-2.0
"""A run stops at the first loss that is not finite, without a wait for the GPU at every micro-batch."""

from collections.abc import Sequence

import torch


class FiniteLosses:
    """The losses of the micro-batches of an optimizer step, until they are checked."""

    def __init__(self):
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep the loss of a micro-batch, and the indices of its rows in the generation batch."""
        self._losses.append((loss.detach(), rows))

    def check(self, step: int, prompts: Sequence[str]) -> None:
        """Forget the losses that were kept.

        Args:
            step: of the optimizer, for the message.
            prompts: of the rows of the generation batch.

        Raises:
            FloatingPointError: one is NaN or infinite; names the step and the rows of its micro-batch.
        """
        losses, self._losses = self._losses, []
        if not losses or bool(torch.stack([loss for loss, _ in losses]).isfinite().all()):
            return
        bad = [index for loss, rows in losses if not loss.isfinite() for index in rows.tolist()]
        raise FloatingPointError(
            f"The loss is not finite at step {step} for the rows with prompts "
            f"{[prompts[index] for index in sorted(set(bad))]}. The weights of earlier checkpoints are "
            "untouched. Lower learning_rate or max_grad_norm, or look at these rows."
        )
