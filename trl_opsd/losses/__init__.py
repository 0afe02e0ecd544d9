# SPDX-License-Identifier: Apache-2.0
"""Losses of on-policy self-distillation: plain functions of tensors that need torch and nothing else."""

from .clip_agreement import clip_agreement, clip_gradient_products
from .closed_form import FusedDiagnostics
from .decomposition import SignalDecomposition, decompose_signal
from .dense import dense_divergence_from_hidden
from .divergences import CLIPS, DIVERGENCES, Divergence, sampled_token_loss, token_divergence
from .fused import fused_divergence
from .head import OutputHead
from .shapes import BoundedShape, LinearShape, Shape, purified_logits, steered_logits
from .target import Target
from .top_k import REMAINDERS, SUPPORTS, top_k_divergence
from .weights import REDUCTIONS, token_weights, weighted_sum

__all__ = [
    "CLIPS",
    "DIVERGENCES",
    "REDUCTIONS",
    "REMAINDERS",
    "SUPPORTS",
    "BoundedShape",
    "Divergence",
    "FusedDiagnostics",
    "LinearShape",
    "OutputHead",
    "Shape",
    "SignalDecomposition",
    "Target",
    "clip_agreement",
    "clip_gradient_products",
    "decompose_signal",
    "dense_divergence_from_hidden",
    "fused_divergence",
    "purified_logits",
    "sampled_token_loss",
    "steered_logits",
    "token_divergence",
    "token_weights",
    "top_k_divergence",
    "weighted_sum",
]
