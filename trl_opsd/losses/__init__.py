# SPDX-License-Identifier: Apache-2.0
"""Losses of on-policy self-distillation: plain functions of tensors that need torch and nothing else."""

from .clip_agreement import clip_agreement, clip_gradient_products
from .closed_form import FusedDiagnostics
from .decomposition import SignalDecomposition, decompose_signal
from .denoising import current_block, denoising_divergence, surest_positions
from .dense import dense_divergence_from_hidden, dense_fact_loss
from .divergences import CLIPS, DIVERGENCES, Divergence, token_divergence
from .fact_loss import fused_fact_loss, sampled_facts
from .facts import Facts
from .fused import fused_divergence
from .gates import LatchedGate, entropy_gate, lookahead_minimum
from .head import OutputHead
from .likeliest import likeliest_tokens, token_overlap
from .sampled import (
    bounded_square,
    brevity_reward,
    clipped_ratio,
    control_variate_advantage,
    critical_weight,
    entropy_direction,
    evidence_weight,
    floored_log_ratio,
    frontier_weight,
    half_softplus,
    held_then_falling,
    importance_weight,
    masked_mean,
    mixed_likelihood,
    outcome_weights,
    policy_loss,
    preference_loss,
    relative_ratio,
    sampled_divergence,
    sequence_log_ratio,
    teacher_polarity,
    view_shares,
)
from .shapes import BoundedShape, LinearShape, MixtureShape, Shape, purified_logits, steered_logits
from .support import REMAINDERS, SUPPORTS, Support
from .target import Target
from .weights import REDUCTIONS, token_weights, weighted_sum
from .whitening import RunningMoments

__all__ = [
    "CLIPS",
    "DIVERGENCES",
    "REDUCTIONS",
    "REMAINDERS",
    "SUPPORTS",
    "BoundedShape",
    "Divergence",
    "Facts",
    "FusedDiagnostics",
    "LatchedGate",
    "LinearShape",
    "MixtureShape",
    "OutputHead",
    "RunningMoments",
    "Shape",
    "SignalDecomposition",
    "Support",
    "Target",
    "bounded_square",
    "brevity_reward",
    "clip_agreement",
    "clip_gradient_products",
    "clipped_ratio",
    "control_variate_advantage",
    "critical_weight",
    "current_block",
    "decompose_signal",
    "denoising_divergence",
    "dense_divergence_from_hidden",
    "dense_fact_loss",
    "entropy_direction",
    "entropy_gate",
    "evidence_weight",
    "floored_log_ratio",
    "frontier_weight",
    "fused_divergence",
    "fused_fact_loss",
    "half_softplus",
    "held_then_falling",
    "importance_weight",
    "likeliest_tokens",
    "lookahead_minimum",
    "masked_mean",
    "mixed_likelihood",
    "outcome_weights",
    "policy_loss",
    "preference_loss",
    "purified_logits",
    "relative_ratio",
    "sampled_divergence",
    "sampled_facts",
    "sequence_log_ratio",
    "steered_logits",
    "surest_positions",
    "teacher_polarity",
    "token_divergence",
    "token_overlap",
    "token_weights",
    "view_shares",
    "weighted_sum",
]
