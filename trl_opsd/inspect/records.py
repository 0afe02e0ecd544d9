# SPDX-License-Identifier: Apache-2.0
"""What is known of an inspected rollout: plain lists, ready for a page."""

from dataclasses import dataclass, field

from ..teacher.contexts import Rollout


@dataclass(frozen=True)
class SampledRollout:
    """A rollout to inspect: what a method's rule reads of it, and the completion's token ids."""

    rollout: Rollout
    ids: list[int]


@dataclass
class ViewRecord:
    """One distribution along a rollout of T positions; nats.

    Attributes:
        name: "student", "target", or the prompt template of a teacher's view, with " +" and " -" behind it where views
            with the same template are added to the direction and subtracted from it.
        num_contexts: contexts whose mean logits it has; 0 for student and target.
        log_prob, rank: of the rollout's own token, T each; rank 1 is the likeliest.
        entropy: T.
        top_ids, top_log_probs: the likeliest tokens, T lists of k.
    """

    name: str
    num_contexts: int
    log_prob: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_log_probs: list[list[float]] = field(default_factory=list)


@dataclass
class RolloutRecord:
    """Everything a page shows of one rollout.

    Attributes:
        rollout: prompt, solution, text and reward.
        ids, texts, markers: T token ids, their texts in place, and whether they belong to a reflection marker.
        views: student, target and the teacher's views.
        values: T numbers each, in nats, under the names of docs/inspect.md.
        strengths: lambda of each `divergence@i` and `shift@i` in `values`; empty unless the shape is linear.
    """

    rollout: Rollout
    ids: list[int]
    texts: list[str]
    markers: list[bool]
    views: list[ViewRecord]
    values: dict[str, list[float]]
    strengths: list[float]
