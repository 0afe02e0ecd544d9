# SPDX-License-Identifier: Apache-2.0
"""A method of self-distillation as one value: what its teacher reads and how the target is shaped.

A new method is a rule for contexts, a shape, and one `Method(...)`; the trainer does not change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..losses import Shape
from ..teacher.contexts import ContextRule, Rollout


def no_shape(settings: Any, step: int) -> Shape:
    """The target is the anchor alone."""
    return Shape()


@dataclass(frozen=True)
class Method:
    """A method of on-policy self-distillation.

    Attributes:
        name: as the paper writes it.
        contexts: from (rollouts of one prompt, settings, random generator) to the teacher's contexts of each; a
            rollout with no context is not distilled.
        shape: from (settings, optimizer step) to how the direction enters the target.
        needs_solution: every row must have a reference solution.
        needs_group: `contexts` reads the other rollouts of the prompt and their rewards.
        needs_reward: `contexts` reads rewards, so there must be some.
        label: names the kind of a group from (rollouts, settings); the share of each kind is logged.
        paper: title, arXiv id and citation, for the model card.
    """

    name: str
    contexts: ContextRule
    shape: Callable[[Any, int], Shape] = no_shape
    needs_solution: bool = True
    needs_group: bool = False
    needs_reward: bool = False
    label: Callable[[Sequence[Rollout], Any], str] | None = None
    paper: dict[str, str] = field(default_factory=dict)
