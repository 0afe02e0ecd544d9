# SPDX-License-Identifier: Apache-2.0
"""Reward functions in TRL's form, used where the user gives none: they monitor, the distillation needs no reward."""

from typing import Any

from .verification import verifies, verify


def accuracy_reward(completions: list, solution: list[str | None], **kwargs: Any) -> list[float | None]:
    """1 where a completion's answer equals the reference's under math-verify, 0 where it does not.

    Args:
        completions: texts, or conversations of one message.
        solution: reference solutions; their last answer counts.
        **kwargs: ignored, TRL passes more columns.

    Returns:
        One reward a completion; None where the reference holds no answer that can be read.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        float(verify(text or "", gold)) if gold is not None and verifies(gold) else None
        for text, gold in zip(texts, solution, strict=True)
    ]


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    """Zero for every completion: for data whose solutions hold no answer to verify."""
    return [0.0] * len(completions)
