# SPDX-License-Identifier: Apache-2.0
"""How much of a reasoning an answer needs: a mask on attention, its objective and its step (AtManRL, arXiv 2604.16158).

m_i <= 0 is added to the attention scores at the reasoning's token i, so exp(m_i) is the share of its weight that is left before
weights are normalised. The objective asks for a likely answer that reads as little of the reasoning as possible.
"""

from __future__ import annotations

import torch

from .sampled import masked_mean


def saliency(values: torch.Tensor, is_reasoning: torch.Tensor) -> torch.Tensor:
    """mean_i exp(m_i) over the reasoning, in [0, 1]; 0 where there is none.

    Args:
        values: (..., T) the mask m, at most 0.
        is_reasoning: (..., T) nonzero on tokens of the reasoning.
    """
    return masked_mean(values.exp(), is_reasoning)


def saliency_objective(
    log_probs: torch.Tensor, is_answer: torch.Tensor, values: torch.Tensor, is_reasoning: torch.Tensor, sparsity: float
) -> torch.Tensor:
    """-mean_t log q_m(a_t) + c mean_i exp(m_i) of each row.

    Args:
        log_probs: (B, A) of the answer's tokens, read under the mask.
        is_answer: (B, A) nonzero on tokens of the answer.
        values, is_reasoning: (B, T), see `saliency`.
        sparsity: c, 0 or more.
    """
    return sparsity * saliency(values, is_reasoning) - masked_mean(log_probs, is_answer)


def lifted(values: torch.Tensor, slope: torch.Tensor, rate: float) -> torch.Tensor:
    """min(0, m - rate * slope): a step of gradient descent on the mask, put back to where it hides and adds nothing."""
    return (values - rate * slope).clamp(max=0.0)
