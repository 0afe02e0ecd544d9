# SPDX-License-Identifier: Apache-2.0
"""The tokens that a model finds likeliest at each position, and how many of another sequence's are among them."""

from __future__ import annotations

import torch

from .divergences import compute_dtype
from .head import OutputHead
from .projection import Projection, product_dtype
from .shapes import check_num_tokens
from .tiles import MIN_TILE_TOKENS


@torch.no_grad()
def likeliest_tokens(
    hidden: torch.Tensor, head: OutputHead, k: int, *, num_tokens: int | None = None, tile_tokens: int = MIN_TILE_TOKENS
) -> torch.Tensor:
    """The k likeliest tokens of every position, in no order; logits are made of a few positions at a time.

    Args:
        hidden: (N, H) that predict the tokens.
        head: of the model.
        k: 1 or more; where it is more than there are tokens, all.
        num_tokens: only the first so many count, in [1, V]; None for all.
        tile_tokens: positions at a time, 1 or more.

    Returns:
        (N, min(k, V)) int64.
    """
    head = head.first_rows(check_num_tokens(num_tokens, head.weight.shape[0]))
    project = Projection.of(head, 1.0, product_dtype(hidden))
    shape = (min(tile_tokens, max(1, len(hidden))), project.num_tokens)
    logits = hidden.new_empty(shape, dtype=compute_dtype(hidden.dtype))
    k = min(k, project.num_tokens)
    found = [hidden.new_zeros((0, k), dtype=torch.long)]
    for part in hidden.split(tile_tokens):
        found.append(project.write_logits(part, logits[: len(part)]).topk(k, dim=-1, sorted=False).indices)
    return torch.cat(found)


def token_overlap(tokens: torch.Tensor, likeliest: torch.Tensor) -> float:
    """Share of a sequence's tokens that are among the likeliest at the same place of another (BRTS, arXiv 2605.09725).

    Args:
        tokens: (M,) of the sequence; a place behind the N of the other counts as no match.
        likeliest: (N, k) of the other.

    Returns:
        In [0, 1]; 0 of an empty sequence.
    """
    length = min(len(tokens), len(likeliest))
    hits = (tokens[:length, None] == likeliest[:length]).any(-1).sum().item()
    return hits / max(1, len(tokens))
