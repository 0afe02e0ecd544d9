# SPDX-License-Identifier: Apache-2.0
"""What is known of an inspected rollout: plain lists, ready for a page."""

from collections.abc import Sequence
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
            with the same template are added to the direction and subtracted from it, with a number where several are
            read, and with the weights that read it where they are not the teacher's.
        num_contexts: contexts whose mean logits it has; 0 for student and target.
        log_prob, rank: of the rollout's own token, T each; rank 1 is the likeliest.
        entropy: T.
        top_ids, top_log_probs: the likeliest tokens, T lists of k.
        weight: of a view that is read; None for the others.
        reads: what the view is shown before the rollout, the first of several, as text; empty for student and target.
    """

    name: str
    num_contexts: int
    log_prob: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_log_probs: list[list[float]] = field(default_factory=list)
    weight: float | None = None
    reads: str = ""


@dataclass
class RolloutRecord:
    """Everything a page shows of one rollout, or of the sequence beside one.

    Attributes:
        rollout: prompt, solution, text and reward.
        ids, texts, markers: T token ids, their texts in place, and whether they belong to a reflection marker.
        views: student, target where the method has one, and the teacher's views.
        values: T numbers each, in nats unless docs/inspect.md says otherwise, under its names.
        strengths: lambda of each `divergence@i` and `shift@i` in `values`; empty unless the shape is linear.
        numbers: of the whole rollout, by name: its advantage, its loss.
        is_extra: it is the sequence beside the rollout before it.
    """

    rollout: Rollout
    ids: list[int]
    texts: list[str]
    markers: list[bool]
    views: list[ViewRecord]
    values: dict[str, list[float]]
    strengths: list[float]
    numbers: dict[str, float] = field(default_factory=dict)
    is_extra: bool = False

    @classmethod
    def of_views(cls, views: Sequence[ViewRecord]) -> "RolloutRecord":
        """A record of nothing but views."""
        return cls(Rollout("", None, ""), [], [], [], list(views), {}, [])
