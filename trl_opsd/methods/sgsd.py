# SPDX-License-Identifier: Apache-2.0
"""SGSD: several teachers, each shown a skill and each judged before it is followed (arXiv 2605.28791).

With d = log p_k(y_t) - log q(y_t) under the k-th teacher, s_k the mean of clip(d, -3, 3) over a rollout, and o = +1 for a
right rollout and -1 for a wrong one, the loss of a rollout is the sum over k of

    w_k o sign(s_k) mean_t [log 2 - softplus(-d^2 / 2)],    where sign(s) = 0 for |s| <= 0.05.

A teacher that found a right rollout likelier than the student did is followed, one that found a wrong rollout likelier is
fled from, and one that has no opinion is left out. Far from the student the pull fades (see `losses.bounded_square`).

Ours reads skills from the column `skills` of the dataset, a list of texts a row, and their retrieval scores from
`skill_scores`. The paper finds them by embedding in a bank that it rewrites every 25 steps, a skill paired with a mistake:
bank, retrieval and refresh are not here; pair the texts beforehand, and change the dataset between runs. Rows without a
skill and rollouts without a reward are not trained on. Where skills are shown, a solution is not.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..losses import bounded_square, masked_mean, teacher_polarity
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from .base import Method, RowFacts

_MOST_NEWLINES = 8  # of a run, as in the official code


def skill_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view of each skill, with the weight w_k.

    Args:
        group: rollouts whose columns hold `skills`, a list of texts, and perhaps `skill_scores`, a number for each.
        settings: reads `max_skills`.
        moment: not read.

    Raises:
        ValueError: a row has another number of scores than of skills.
    """
    return [() if rollout.reward is None else _views(rollout, settings.max_skills) for rollout in group]


def _views(rollout: Rollout, most: int) -> Contexts:
    skills, scores = rollout.columns.get("skills") or [], rollout.columns.get("skill_scores")
    if scores is not None and len(scores) != len(skills):
        raise ValueError(
            f"`skill_scores` has {len(scores)} numbers for {len(skills)} texts in `skills`; give one for each, or None."
        )
    order = sorted(range(len(skills)), key=lambda k: -scores[k]) if scores else range(len(skills))
    kept = [(skills[k], math.exp(scores[k] - max(scores)) if scores else 1.0) for k in list(order)[:most]]
    total = sum(weight for _, weight in kept)
    return tuple(
        TeacherContext("skill", None, texts=(("skill", skill),), read=weight / total) for skill, weight in kept
    )


def judged_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """(B,) loss of each rollout.

    Args:
        facts: with views (K, B, D) and `reward`.
        settings: reads `reward_threshold`, `support_clip` and `support_threshold`.
        moment: not read.
    """
    given, mask = facts.given, facts.given["mask"]
    ratio = (given["view_log_probs"] - facts.log_prob).masked_fill(mask == 0, 0.0)
    right = given["reward"][:, 0] >= settings.reward_threshold
    limits = {"bound": settings.support_clip, "threshold": settings.support_threshold}
    weights = given["view_weights"][..., 0] * teacher_polarity(ratio, mask, right, **limits)
    return (weights * masked_mean(bounded_square(ratio), mask)).sum(0)


def tokens_of_form(tokenizer: Any, settings: Any) -> set[int]:
    """Ids of control tokens, of the marks of a think block and of runs of newlines, where each is one token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    for text in ("<think>", "</think>", *("\n" * count for count in range(1, _MOST_NEWLINES + 1))):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids |= set(encoded) if len(encoded) == 1 else set()
    return ids


SGSD = Method(
    name="SGSD",
    contexts=skill_contexts,
    needs_solution=False,
    needs_reward=True,
    loss=judged_loss,
    has_target=False,
    reads_views=True,
    templates=lambda settings: {"skill": settings.skill_prompt_template},
    needs_columns=("skills",),
    columns=("skills", "skill_scores"),
    ignored_tokens=tokens_of_form,
    paper={
        "title": "Skill-Conditioned Gated Self-Distillation for LLM Reasoning",
        "id": "2605.28791",
        "citation": """@misc{sgsd2026,
    title  = {{Skill-Conditioned Gated Self-Distillation for LLM Reasoning}},
    author = {Jiazhen Huang and Xiao Chen and Xiao Luo and Yong Dai and Senkang Hu and Yuzhi Zhao},
    year   = 2026,
    eprint = {2605.28791},
    archivePrefix = {arXiv},
}""",
    },
)
