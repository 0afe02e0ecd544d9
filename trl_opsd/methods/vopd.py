# SPDX-License-Identifier: Apache-2.0
"""vOPD: the log-ratio of the sampled token, less its mean under the student (arXiv 2605.07865).

    loss = - mean A_t r log student(y_t),  A_t = u + KL(student || teacher),  u = log teacher(y_t) - log student(y_t)

with A_t held constant and r the ratio to the policy that sampled, under PPO's clip. The mean of u under the student is
-KL(student || teacher), so A_t has mean 0 and the expected gradient stays that of the reverse KL. The KL may be taken over
the student's likeliest tokens, both sides renormalised: then A_t has another mean, and the gradient still no bias. Without the
baseline u may have a floor, as a later version of the official code has.

It is a loss of its own and not an advantage in TRL's: TRL averages over all tokens of the completions, so that a cut at
`distillation_length` would shrink the step; and it builds the logits once more. With `reward_weight` TRL's loss is added, which is
the paper's A + A_t where the ratio is 1. Differences to the paper: the teacher is the model itself, which has read the solution,
there a larger one; and u and the KL are those of the student of now also where a batch is used for several steps.
"""

from typing import Any

import torch

from ..losses import control_variate_advantage, floored_log_ratio
from ..teacher.contexts import Moment
from .base import Method, RowFacts
from .groups import policy_gradient
from .opsd import privileged_contexts
from .papers import arxiv_paper


def token_advantage(facts: RowFacts, settings: Any) -> torch.Tensor:
    """A_t, (n,), detached: u with its baseline, its floor, or alone."""
    ratio = facts.log_prob_ratio.detach()
    if settings.use_baseline:
        return control_variate_advantage(ratio, facts.divergence)
    share = settings.ratio_floor_share
    return ratio if share is None else floored_log_ratio(ratio, share=share)


def sampled_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """-A_t r log student(y_t), (n,)."""
    return policy_gradient(facts, facts.keep("advantage", token_advantage(facts, settings)), settings)


VOPD = Method(
    name="vOPD",
    contexts=privileged_contexts,
    contexts_from_rows=True,
    loss=sampled_loss,
    pointwise=True,
    reads_old=True,
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper(
        "KL for a KL: On-Policy Distillation with Control Variate Baseline",
        "2605.07865",
        "oh2026kl",
        "Minjae Oh and Sangjun Song and Gyubin Choi and Yunho Choi and Yohan Jo",
    ),
)
