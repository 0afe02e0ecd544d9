# SPDX-License-Identifier: Apache-2.0
"""The tail anchor: likelihood of the last tokens of some rollouts, beside the distillation and in its student forward.

It may lie behind the distilled span. Its mean is over the anchored tokens of the whole optimizer step, on all ranks.
"""

from typing import Any

import torch

from ..heads import OutputHead
from ..losses import fused_token_nll, token_weights
from ..losses.tiles import nonzero_positions


def tail_mask(batch: dict[str, Any], lengths: list[int]) -> torch.Tensor:
    """(B, T), 1 on the last `lengths` (B) tokens of each rollout, never on a tool's."""
    mask = batch["completion_mask"]
    first = mask.sum(dim=1) - torch.tensor(lengths, device=mask.device)
    tail = mask * (torch.arange(mask.size(1), device=mask.device) >= first.unsqueeze(1))
    return tail * batch["tool_mask"] if "tool_mask" in batch else tail


def count_tail_tokens(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a micro-batch adds to the count of the mean; nothing without an anchor."""
    return {"num_tail_tokens": batch["tail_mask"].sum()} if "tail_mask" in batch else {}


def locate_tail(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A micro-batch's `tail_mask` up to the end of the last tail, and where it is not 0; waits for the device."""
    if "tail_mask" not in batch:
        return {}
    ends = nonzero_positions(batch["tail_mask"].any(dim=0)).tolist()
    mask = batch["tail_mask"][:, : max(ends, default=-1) + 1]
    return {"tail_mask": mask, "tail_positions": nonzero_positions(mask)}


def student_length(batch: dict[str, Any]) -> int:
    """Completion tokens the student must run over: the distilled span, and up to the end of the last tail."""
    return max(batch[name].size(1) for name in ("distillation_mask", "tail_mask") if name in batch)


def tail_loss(
    states: torch.Tensor, head: OutputHead, batch: dict[str, Any], num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of the anchored tokens, and this micro-batch's sum and number of them.

    Args:
        states: (B, L, H) student's hidden states from the one that predicts the first completion token on.
        head: the output head.
        batch: a micro-batch with `tail_mask` and the global count `num_tail_tokens`.
        num_ranks: engines average gradients over ranks, so each divides by its share of the count.

    Returns:
        0-d loss at temperature 1; (2,) the detached sum in nats and the number of tokens.
    """
    mask = batch["tail_mask"][:, : states.size(1)]
    states = states[:, : mask.size(1)]
    denominator = batch["num_tail_tokens"].clamp(min=1) / num_ranks
    loss, values = fused_token_nll(
        states.flatten(0, 1),
        head.weight,
        batch["completion_ids"][:, : mask.size(1)].flatten(),
        token_weights=token_weights(mask, denominator=denominator).flatten(),
        positions=batch.get("tail_positions"),
        head_bias=head.bias,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )
    return loss, torch.stack([values.sum(), mask.sum()])
