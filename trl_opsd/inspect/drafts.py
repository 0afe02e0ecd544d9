# SPDX-License-Identifier: Apache-2.0
"""What the model writes for an inspected rollout before contexts are made, as training has it written."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..losses import token_overlap
from ..rewards import accuracy_reward
from ..teacher.contexts import Draft, Moment, Rollout, TeacherContext, Written

Write = Callable[[Rollout, TeacherContext, Any], Written]


def with_drafts(
    method: Any, settings: Any, rollout: Rollout, moment: Moment, write: Write, likeliest: Callable[[int], torch.Tensor]
) -> Rollout:
    """A rollout with its drafts; math-verify rewards those that are answers.

    Args:
        method: of the inspection.
        settings: of the run.
        rollout: with all that is known before.
        moment: of the group.
        write: what the model answers to a context, with settings of sampling.
        likeliest: from k to the student's likeliest tokens along the rollout (T, k).
    """
    rule = method.drafts
    if rule is None:
        return rollout
    drawn = copy.copy(settings)
    for name, value in ({} if rule.sampling is None else rule.sampling(settings)).items():
        setattr(drawn, name, value)
    while (context := rule.asks(rollout, settings, moment)) is not None:
        written = write(rollout, context, drawn)
        draft = Draft(written.text, written.ids)
        if rule.top_k is not None:
            (reward,) = accuracy_reward([written.text], [rollout.solution])
            overlap = token_overlap(torch.tensor(written.ids), likeliest(rule.top_k(settings)))
            draft = replace(draft, reward=reward, overlap=overlap)
        rollout = replace(rollout, drafts=(*rollout.drafts, draft))
    return rollout
