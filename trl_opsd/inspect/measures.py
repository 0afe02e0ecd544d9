# SPDX-License-Identifier: Apache-2.0
"""Numbers per token, from log-probabilities over the whole vocabulary; nats unless said otherwise."""

from collections.abc import Sequence

import torch

from ..losses import Divergence, MixtureShape, Shape, decompose_signal
from ..losses.divergences import clip_and_sum, clipped_terms, divergence_terms
from .records import ViewRecord
from .views import Views


def at(log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (n,) of `tokens` (n,) in `log_probs` (n, V)."""
    return log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def extend_view(record: ViewRecord, log_probs: torch.Tensor, tokens: torch.Tensor, num_top: int) -> None:
    """Append n positions of a distribution (n, V) to its record."""
    own = at(log_probs, tokens)
    top = log_probs.topk(min(num_top, log_probs.size(-1)), dim=-1)
    record.log_prob += own.tolist()
    record.rank += ((log_probs > own[:, None]).sum(-1) + 1).tolist()
    record.entropy += (-(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)).tolist()
    record.top_ids += top.indices.tolist()
    record.top_log_probs += top.values.tolist()


def measure_loss(log_q: torch.Tensor, log_p: torch.Tensor, tokens: torch.Tensor, rule: Divergence) -> dict:
    """The divergence, what its clip takes from it, and the target's opinion of the rollout's own token.

    Args:
        log_q, log_p: (n, V) student and target.
        tokens: (n,) the rollout's ids.
        rule: the loss's divergence and clip; its temperature is not read.

    Returns:
        (n,) each: `divergence` (unclipped), `clipped_away`, `clipped_entries` (a count), `target_ratio`.
    """
    terms = divergence_terms(log_q, log_p, rule, tokens)
    unclipped = terms.sum(-1)
    return {
        "divergence": unclipped,
        "clipped_away": unclipped - clip_and_sum(terms, rule),
        "clipped_entries": clipped_terms(terms, rule).sum(-1),
        "target_ratio": at(log_p - log_q, tokens),
    }


def measure_direction(
    views: Views, shapes: Sequence[tuple[str, Shape]], log_q: torch.Tensor, tokens: torch.Tensor, rule: Divergence
) -> dict:
    """What each shape of the direction does: the divergence, and how far it moves the rollout's own token.

    Args:
        views: at n positions.
        shapes: pairs of a suffix for the names and a shape; those that read no direction are passed over.
        log_q, tokens, rule: as in [`measure_loss`].

    Returns:
        (n,) each: `shift` + suffix, log p_target - log p_anchor of the token, and `divergence` + suffix. Of a mixture also
        the direction's share of it.
    """
    measured = {}
    for suffix, shape in shapes:
        if shape.uses_direction:
            log_p = views.target(shape).log_softmax(-1)
            measured[f"shift{suffix}"] = at(log_p - views.anchor.log_softmax(-1), tokens)
            measured[f"divergence{suffix}"] = divergence_terms(log_q, log_p, rule, tokens).sum(-1)
        if isinstance(shape, MixtureShape):
            measured["own@share mixed in"] = shape.share(views.direction, views.anchor).squeeze(-1)
    return measured


def decompose(log_q: torch.Tensor, log_t: torch.Tensor, log_r: torch.Tensor, tokens: torch.Tensor) -> dict:
    """log T - log q = (log R - log q) + (log T - log R), the diagnosis of arXiv 2607.02234.

    Args:
        log_q: (n, V) the student.
        log_t: (n, V) the teacher that reads problem and solution.
        log_r: (n, V) the teacher that reads the solution alone.
        tokens: (n,) the rollout's ids.

    Returns:
        (n,) each: `total`, `reference_induced` and `question_conditioned` at the rollout's own token; their L2 norms
        over the vocabulary, `norm_` and the name; and `cosine_reference_question` between the two parts.
    """
    parts = {"total": log_t - log_q, "reference_induced": log_r - log_q, "question_conditioned": log_t - log_r}
    signal = decompose_signal(log_q, log_t, log_r)
    return {name: at(part, tokens) for name, part in parts.items()} | {
        "norm_total": signal.total_norm,
        "norm_reference_induced": signal.reference_ratio * signal.total_norm,
        "norm_question_conditioned": signal.question_ratio * signal.total_norm,
        "cosine_reference_question": signal.parts_cosine,
    }
