# SPDX-License-Identifier: Apache-2.0
"""From sampled rollouts to what a method says of them: groups by prompt, the teacher's contexts, extras."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object

from ..methods import Extra, Method
from ..teacher.contexts import Contexts, Moment, Rollout

_BATCHES_TO_WARN = 10


@dataclass(frozen=True)
class Reading:
    """What a method says of rollouts, each in their order.

    Attributes:
        contexts: of the teacher.
        extras: sequences beside them.
        marks: numbers of each rollout or of its tokens; empty where the method has none.
        metrics: for the log.
    """

    contexts: list[Contexts]
    extras: list[Extra | None]
    marks: list[float | Sequence[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class GroupReader:
    """Asks a method about groups that may straddle ranks, and counts the kinds of groups.

    Args:
        method: that is asked.
        settings: of the run.
        accelerator: of the trainer.
    """

    def __init__(self, method: Method, settings: Any, accelerator: Any):
        self.method, self.settings, self._accelerator = method, settings, accelerator
        self._labels: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._unsplit = self._unused = 0

    def read(self, rollouts: list[Rollout], size: int, moment: Moment) -> Reading:
        """What the method says of this rank's rollouts; a collective.

        Args:
            rollouts: of this rank, in the order of the batch.
            size: rollouts of a prompt.
            moment: of the batch.
        """
        groups, own = self._groups(rollouts, size)
        contexts = [views for group in groups for views in self.method.contexts(group, self.settings, moment)]
        extras: list[Extra | None] = [None] * len(contexts)
        if self.method.extras is not None:
            extras = [extra for group in groups for extra in self.method.extras(group, self.settings, moment)]
        marks: list[float | Sequence[float]] = []
        if self.method.marks is not None:
            marks = [mark for group in groups for mark in self.method.marks(group, self.settings, moment)]
        metrics = {}
        if self.method.label is not None:
            labels = [self.method.label(group, self.settings) for group in groups]
            metrics = self._count(labels, contexts, extras, len(groups[0]))
        metrics |= self._count_unused(gather_object([_reason(views) for views in contexts[own]]))
        return Reading(contexts[own], extras[own], marks[own], metrics)

    def _groups(self, rollouts: list[Rollout], size: int) -> tuple[list[list[Rollout]], slice]:
        """Rollouts by prompt, of all ranks, and which of the flat list are this rank's."""
        if not self.method.needs_group:
            return [[rollout] for rollout in rollouts], slice(len(rollouts))
        first = len(rollouts) * self._accelerator.process_index
        own = slice(first, first + len(rollouts))
        rollouts = gather_object(rollouts)
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)], own

    def _count(self, labels: Sequence[str], contexts, extras, size: int) -> dict[str, float]:
        """Shares of the kinds of groups and of those used; warns when rewards split none for long."""
        trained = [bool(views) or extra is not None for views, extra in zip(contexts, extras, strict=True)]
        used = [any(trained[start : start + size]) for start in range(0, len(trained), size)]
        self._labels.update(labels)
        self._unsplit = 0 if "mixed" in labels else self._unsplit + 1
        if self._unsplit == _BATCHES_TO_WARN:
            warnings.warn(
                f"The rewards split no group into right and wrong in {_BATCHES_TO_WARN} generation batches: "
                f"{dict(self._labels)}. Check reward_funcs and reward_threshold, or choose problems of another "
                "difficulty.",
                stacklevel=2,
            )
        shares = {f"groups/{label}": count / len(labels) for label, count in Counter(labels).items()}
        return {"groups/used": sum(used) / len(used), **shares}

    def _count_unused(self, reasons: Sequence[tuple[str, bool, bool]]) -> dict[str, float]:
        """Shares of rows by reason, and of those that are used all the same; warns when none can be used for long."""
        found = Counter(reason for reason, *_ in reasons if reason)
        self._reasons.update(found)
        unused = sum(bool(reason) and not used for reason, used, _ in reasons)
        faults = sum(bool(reason) and not used and not planned for reason, used, planned in reasons)
        self._unused = self._unused + 1 if faults == len(reasons) else 0
        if self._unused == _BATCHES_TO_WARN > self._unsplit:  # else the warning above has said why
            warnings.warn(
                f"{self.method.name} could use no rollout of {_BATCHES_TO_WARN} generation batches. Rollouts by reason, since "
                f"the start: {dict(self._reasons)}.",
                stacklevel=2,
            )
        if not self._reasons:
            return {}
        shares = {f"rows/{reason.replace(' ', '_')}": found[reason] / len(reasons) for reason in self._reasons}
        return {"rows/used": 1 - unused / len(reasons), **shares}

    def state(self) -> dict[str, Any]:
        """The counts so far, as JSON."""
        return {
            "labels": dict(self._labels),
            "unsplit": self._unsplit,
            "reasons": dict(self._reasons),
            "unused": self._unused,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._labels, self._unsplit = Counter(state["labels"]), state["unsplit"]
        self._reasons, self._unused = Counter(state.get("reasons", {})), state.get("unused", 0)


def _reason(views: Contexts) -> tuple[str, bool, bool]:
    """What the log counts of a rollout's contexts, whether they are used, and whether that they are not is planned."""
    return getattr(views, "reason", ""), bool(views), getattr(views, "planned", False)
