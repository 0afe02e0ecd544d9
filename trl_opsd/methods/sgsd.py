# SPDX-License-Identifier: Apache-2.0
"""SGSD: several teachers, each shown a skill and each judged before it is followed (arXiv 2605.28791).

With d = log p_k(y_t) - log q(y_t) under the k-th teacher, s_k the mean of clip(d, -3, 3) over a rollout, and o = +1 for a
right rollout and -1 for a wrong one, the loss of a rollout is the sum over k of

    w_k o sign(s_k) mean_t [log 2 - softplus(-d^2 / 2)],    where sign(s) = 0 for |s| <= 0.05.

A teacher that found a right rollout likelier than the student did is followed, one that found a wrong rollout likelier is
fled from, and one that has no opinion is left out. Far from the student the pull fades (see `losses.bounded_square`).

Skills are found in a bank, a file (`skill_bank`): those nearest to the problem, each with the mistake of its own rank, and w_k is
the softmax of their scores. Or they are written beforehand into the column `skills`, a list of texts a row, with scores in
`skill_scores`. Rows without a skill and rollouts without a reward are left out and counted. Where skills are shown, a solution
is not.

Differences to the official code: the paper's rewriter of the bank is not here. The file is read again every
`skill_bank_refresh_steps` steps, and a process of the user's may rewrite it meanwhile. Without `skill_embedding_model` texts are compared by the
words they share, there by embeddings.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..losses import bounded_square, masked_mean, teacher_polarity
from ..rows.token_texts import tokens_of_form
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method, RowFacts, prompt_templates
from .papers import arxiv_paper
from .skills import remember_bank, skills_from_bank, weighted_skills


def skill_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view of each skill, with the weight w_k."""
    return [_views(rollout, settings.max_skills) for rollout in group]


def _views(rollout: Rollout, most: int) -> Contexts:
    skills = weighted_skills(rollout, most)
    if not skills or rollout.reward is None:
        return Unused("no reward" if skills else "no skill")
    return tuple(TeacherContext("skill", None, texts=(("skill", text),), read=weight) for text, weight in skills)


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
    polarity = facts.keep("polarity", teacher_polarity(ratio, mask, right, **limits).unsqueeze(-1)).squeeze(-1)
    weights = given["view_weights"][..., 0] * polarity
    return (weights * masked_mean(bounded_square(ratio), mask)).sum(0)


SGSD = Method(
    name="SGSD",
    contexts=skill_contexts,
    needs_solution=False,
    needs_reward=True,
    loss=judged_loss,
    has_target=False,
    reads_views=True,
    templates=prompt_templates("skill"),
    notes=skills_from_bank,
    remember=remember_bank,
    report=lambda memory: {"skill_bank_read_at_step": memory["skill_bank"][1]} if memory else {},
    needs_columns=lambda settings: () if settings.skill_bank else ("skills",),
    columns=("skills", "skill_scores"),
    ignored_tokens=lambda tokenizer, settings: tokens_of_form(tokenizer),
    paper=arxiv_paper(
        "Skill-Conditioned Gated Self-Distillation for LLM Reasoning",
        "2605.28791",
        "sgsd2026",
        "Jiazhen Huang and Xiao Chen and Xiao Luo and Yong Dai and Senkang Hu and Yuzhi Zhao",
    ),
)
