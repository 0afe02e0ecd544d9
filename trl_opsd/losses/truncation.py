# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities under truncated sampling: what an engine samples from, and reports."""

import math

import torch


def truncated_log_probs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float | None = None,
) -> torch.Tensor:
    """log p(y_t) (T,) where p is renormalised over the tokens that sampling may draw, and over y_t in any case.

    An engine's number of a token lies on its side of every cut; ours of the same token may lie beyond it by rounding.

    Args:
        logits: raw (T, V).
        tokens: (T,).
        temperature: above 0, applied first.
        top_k: likeliest tokens kept; None or 0 for all.
        top_p: mass of the likeliest tokens that are kept, in (0, 1]; of what `top_k` kept.
        min_p: least share of the likeliest token's probability; None for none.
    """
    log_probs = (logits / temperature).log_softmax(-1)
    kept = torch.ones_like(log_probs, dtype=torch.bool)
    if min_p:
        kept &= log_probs >= log_probs.amax(-1, keepdim=True) + math.log(min_p)
    if top_k:
        kept &= log_probs >= log_probs.topk(min(top_k, log_probs.size(-1)))[0][..., -1:]
    if top_p < 1:
        left = log_probs.masked_fill(~kept, -math.inf).softmax(-1)
        ordered, places = left.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept &= torch.zeros_like(kept).scatter(-1, places, before < top_p)
    kept = kept.scatter(-1, tokens.unsqueeze(-1), True)
    return log_probs.masked_fill(~kept, -math.inf).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
