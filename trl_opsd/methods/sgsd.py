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

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses import bounded_square, masked_mean, teacher_polarity
from ..rows.skill_bank import skill_bank_file
from ..rows.texts import message_text
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method, RowFacts, Seen

_MOST_NEWLINES = 8  # of a run, as in the official code


def skills_from_bank(rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[Any]:
    """Of each rollout texts with scores, the bank's digest and the step at which it was read; None without a bank.

    Args:
        rollouts: of this rank.
        settings: reads `skill_bank` and what belongs to it.
        moment: its memory holds the digest and the step of before.
    """
    if settings.skill_bank is None:
        return [None] * len(rollouts)
    digest, read_at = moment.memory.get("skill_bank", (None, 0))
    due = digest is None or moment.step - read_at >= settings.skill_bank_refresh_steps
    bank = skill_bank_file(settings.skill_bank, settings.skill_embedding_model).current(digest, due=due)
    read_at = moment.step if due else read_at
    problems = [
        prompt if isinstance(prompt, str) else message_text(prompt[-1]) for prompt in (r.prompt for r in rollouts)
    ]
    found = {problem: tuple(bank.retrieve(problem, settings.max_skills)) for problem in dict.fromkeys(problems)}
    return [(found[problem], bank.digest, read_at) for problem in problems]


def remember_bank(memory: Mapping[str, Any], seen: Seen, settings: Any) -> dict[str, Any]:
    """Digest of the bank that was used, and the step at which it was read: those of the batch's first rollout."""
    note = seen.rollouts[0].note
    return {} if note is None else {"skill_bank": list(note[1:])}


def skill_contexts(group: Sequence[Rollout], settings: Any, moment: Moment) -> list[Contexts]:
    """One view of each skill, with the weight w_k.

    Args:
        group: rollouts whose notes come from the bank, or whose columns hold `skills`, a list of texts, and perhaps
            `skill_scores`, a number for each.
        settings: reads `max_skills`.
        moment: not read.

    Raises:
        ValueError: a row has another number of scores than of skills.
    """
    return [_views(rollout, settings.max_skills) for rollout in group]


def _views(rollout: Rollout, most: int) -> Contexts:
    skills, scores = rollout.columns.get("skills") or [], rollout.columns.get("skill_scores")
    if rollout.note is not None:
        skills, scores = (list(part) for part in zip(*rollout.note[0], strict=True))
    if not skills or rollout.reward is None:
        return Unused("no reward" if skills else "no skill")
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
    notes=skills_from_bank,
    remember=remember_bank,
    report=lambda memory: {"skill_bank_read_at_step": memory["skill_bank"][1]} if memory else {},
    needs_columns=lambda settings: () if settings.skill_bank else ("skills",),
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
