# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of given tokens from hidden states, in the tiles of the fused divergence.

It is the forward KL to a target with all mass on the token, so value, gradient and tiles are those of that divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .divergences import Divergence
from .tiles import fused_loss, whole_head

# As a logit beside 0 its probability is exactly 0 in float64 too, and its product with that 0 is finite.
_NO_MASS = -1e4


@dataclass(frozen=True)
class TokenTarget:
    """A target with all mass on `token_ids` (n,)."""

    token_ids: torch.Tensor
    num_tiles = 1

    def write(self, rows: slice, tiles: Sequence[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """Logits (n, V), and no direction; see `TargetViews.write`."""
        return tiles[0].fill_(_NO_MASS).scatter_(1, self.token_ids[rows].unsqueeze(-1), 0.0), None


def fused_token_nll(
    student_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    token_weights: torch.Tensor,
    temperature: float = 1.0,
    head_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    tile_tokens: int | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over positions of -log q(token), without logits of the whole batch.

    Args:
        student_hidden: (N, H) final hidden states, each the one that predicts its token.
        head_weight: (V, H) output head, whole; a DTensor is gathered once.
        token_ids: (N,) int64, in [0, V); not read where the weight is 0.
        token_weights: (N,); 0 leaves a position out.
        temperature: divisor of the logits, > 0.
        head_bias, logit_scale, logit_softcap, tile_tokens, positions: as in [`fused_divergence`].

    Returns:
        0-d loss with a gradient to `student_hidden`, `head_weight` and `head_bias`, and (N,) detached negative
        log-likelihoods in nats, 0 where the weight is 0.

    Raises:
        ValueError: for shapes that do not match or a setting out of range.
    """
    for field, tensor in (("token_ids", token_ids), ("student_hidden", student_hidden[..., 0])):
        if tensor.shape != token_weights.shape or tensor.ndim != 1:
            raise ValueError(
                f"{field} is for {tuple(tensor.shape)} positions and token_weights for {tuple(token_weights.shape)}; "
                "pass one row per position, (N,)."
            )
    loss, diagnostics = fused_loss(
        student_hidden,
        whole_head(head_weight, head_bias, head_weight.shape[0]),
        lambda positions: TokenTarget(token_ids[positions]),
        token_weights,
        Divergence("forward_kl", temperature=temperature),
        tile_tokens,
        positions=positions,
        logit_scale=logit_scale,
        softcap=logit_softcap,
    )
    return loss, diagnostics.loss
