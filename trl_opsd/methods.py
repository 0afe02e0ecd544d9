# SPDX-License-Identifier: Apache-2.0
"""A method of self-distillation as one value: what its teacher reads and how the target is shaped.

A new method is a rule for contexts, a shape, and one `Method(...)`; the trainer does not change.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .contexts import ContextRule, privileged_contexts
from .losses import Shape


def no_shape(settings: Any, step: int) -> Shape:
    """The target is the anchor alone."""
    return Shape()


@dataclass(frozen=True)
class Method:
    """A method of on-policy self-distillation.

    Attributes:
        name: as the paper writes it.
        contexts: from a group of rollouts of one prompt to the teacher's contexts of each; a rollout with no context
            is not distilled.
        shape: from (settings, optimizer step) to how the direction enters the target.
        needs_solution: every row must have a reference solution.
        needs_group: `contexts` reads the other rollouts of the prompt and their rewards.
        real_tokens_only: compare the rows of the head that the tokenizer has tokens for, not padding rows.
        paper: title, arXiv id and citation, for the model card.
    """

    name: str
    contexts: ContextRule
    shape: Callable[[Any, int], Shape] = no_shape
    needs_solution: bool = True
    needs_group: bool = False
    real_tokens_only: bool = False
    paper: dict[str, str] = field(default_factory=dict)


OPSD = Method(
    name="OPSD",
    contexts=privileged_contexts,
    paper={
        "title": "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        "id": "2601.18734",
        "citation": """@article{zhao2026self,
    title   = {{Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models}},
    author  = {Siyan Zhao and Zhihui Xie and Mengchen Liu and Jing Huang and Guan Pang and Feiyu Chen and Aditya Grover},
    year    = 2026,
    journal = {arXiv preprint arXiv:2601.18734},
}""",
    },
)
