# SPDX-License-Identifier: Apache-2.0
"""Dense logits of student and teacher along one rollout, and the target they make."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..losses import Shape
from ..teacher.contexts import TeacherContext


@dataclass
class Views:
    """Tempered logits (T, V) along a rollout.

    Attributes:
        student: of the student.
        anchor, direction: weighted sums of the teacher's views; None where no view has a weight in it.
        pools: mean of the views of each name.
        counts: how many views that is.
        weights: of the views that are read, by name.
        reads: what the first view of each name is shown, as text.
        solution: the teacher's view of problem and solution, and of the solution alone; None without a solution.
    """

    student: torch.Tensor
    anchor: torch.Tensor | None = None
    direction: torch.Tensor | None = None
    pools: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    solution: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, name: str, context: TeacherContext, logits: torch.Tensor) -> None:
        """Add one view of the teacher under a name."""
        if context.anchor:
            self.anchor = _plus(self.anchor, context.anchor * logits)
        if context.direction:
            self.direction = _plus(self.direction, context.direction * logits)
        if context.read is not None:
            self.weights[name] = context.read
        self.counts[name] += 1
        before = self.pools.get(name)
        self.pools[name] = logits if before is None else before + (logits - before) / self.counts[name]

    def rows(self, rows: slice) -> "Views":
        """The same at some positions."""
        return replace(
            self,
            student=self.student[rows],
            anchor=None if self.anchor is None else self.anchor[rows],
            direction=None if self.direction is None else self.direction[rows],
            pools={name: logits[rows] for name, logits in self.pools.items()},
            solution=None if self.solution is None else tuple(logits[rows] for logits in self.solution),
        )

    def target(self, shape: Shape) -> torch.Tensor:
        """Logits (T, V) of the target: anchor + shape(direction)."""
        if not shape.uses_direction:
            return self.anchor
        known = {"anchor_logits": self.anchor} if getattr(shape, "reads_anchor", False) else {}
        return self.anchor + shape(self.direction, **known)


def pool_names(contexts: Sequence[TeacherContext]) -> list[str]:
    """Name of the pool of each context.

    It is the template, with a sign where a template is added and subtracted, with a number where it is read several times,
    and with the weights that read it where they are not the teacher's.
    """
    signs: dict[str, set[bool]] = {}
    for context in contexts:
        if context.direction:
            signs.setdefault(context.template, set()).add(context.direction > 0)
    reads = Counter(context.template for context in contexts if context.read is not None)
    names, seen = [], Counter()
    for context in contexts:
        name = context.template
        if context.direction and len(signs[name]) > 1:
            name += " +" if context.direction > 0 else " -"
        if context.read is not None and reads[context.template] > 1:
            seen[context.template] += 1
            name += f" {seen[context.template]}"
        names.append(name if context.weights == "teacher" else f"{name} ({context.weights})")
    return names


def _plus(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total + term
