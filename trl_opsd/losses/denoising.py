# SPDX-License-Identifier: Apache-2.0
"""The loss of one denoising step of a masked-diffusion language model (d-OPSD, arXiv 2606.18195)."""

from __future__ import annotations

import torch

from .divergences import Divergence, clip_and_sum, clipped_terms, divergence_terms, log_probs


def current_block(masked: torch.Tensor, block_length: int) -> torch.Tensor:
    """Which positions (n, C) of a state are masked and in its current block, that of its first masked position.

    Args:
        masked: (n, C) bool, True where a position of the answer is masked.
        block_length: positions of a block, >= 1; blocks begin at the answer's first position.

    Raises:
        ValueError: a state has no masked position.
    """
    if not bool(masked.any(-1).all()):
        raise ValueError(
            "masked has a row without a masked position, which has no current block; leave whole answers out."
        )
    blocks = torch.arange(masked.shape[-1], device=masked.device) // block_length
    first = masked.int().argmax(-1, keepdim=True)
    return masked & (blocks == first // block_length)


def surest_positions(logits: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` candidates of each state with the largest raw logit, as the authors' code chooses them: (n, count) indices.

    A raw logit and no probability: a position whose logits all lie higher comes first, however undecided it is.

    Args:
        logits: (n, C, V) of the teacher.
        candidates: (n, C) bool.
        count: positions of a state, >= 1.

    Raises:
        ValueError: a state has fewer candidates.
    """
    fewest = int(candidates.sum(-1).min())
    if fewest < count:
        raise ValueError(f"count={count}, but a state has {fewest} candidates; set the number that a step fills in.")
    largest = logits.detach().amax(-1).masked_fill(~candidates, -torch.inf)
    return largest.topk(count, dim=-1).indices


def denoising_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, rule: Divergence
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over a state's positions of the divergence (n,), a mean over states of which is the paper's loss of one sample.

    Args:
        student_logits: (n, K, V) at the K chosen positions of n states; the only input with a gradient.
        teacher_logits: (n, K, V) of the same positions.
        rule: the divergence. The authors' is reverse KL over the teacher's 20 likeliest tokens, renormalised, each entry's term
            cut at 0.05.

    Returns:
        The sums (n,), and by name, detached, (n,): `divergence`, the sum without a clip, and `clipped_share` of the entries.
    """
    log_q, log_p = log_probs(student_logits, teacher_logits, rule.temperature)
    terms = divergence_terms(log_q, log_p, rule)
    seen = terms.detach()
    return clip_and_sum(terms, rule).sum(-1), {
        "divergence": seen.sum((-1, -2)),
        "clipped_share": clipped_terms(seen, rule).to(seen.dtype).mean((-1, -2)),
    }
