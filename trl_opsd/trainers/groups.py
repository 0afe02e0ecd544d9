# SPDX-License-Identifier: Apache-2.0
"""From sampled rollouts to what a method says of them: groups by prompt, the teacher's contexts, extras."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from ..methods import Extra, Method
from ..teacher.contexts import Contexts, Moment, Rollout

_BATCHES_TO_WARN = 10


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
        self._unsplit = 0

    def read(
        self, rollouts: list[Rollout], size: int, moment: Moment
    ) -> tuple[list[Contexts], list[Extra | None], dict[str, float]]:
        """Contexts and extras of this rank's rollouts, and numbers for the log; a collective where groups are read.

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
        metrics = {}
        if self.method.label is not None:
            labels = [self.method.label(group, self.settings) for group in groups]
            metrics = self._count(labels, contexts, extras, len(groups[0]))
        return contexts[own], extras[own], metrics

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

    def state(self) -> dict[str, Any]:
        """The counts so far, as JSON."""
        return {"labels": dict(self._labels), "unsplit": self._unsplit}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._labels, self._unsplit = Counter(state["labels"]), state["unsplit"]
