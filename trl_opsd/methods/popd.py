# SPDX-License-Identifier: Apache-2.0
"""POPD and TOPD: distil the first tokens of a rollout alone, by the log-ratio of the sampled token (arXiv 2605.31490).

    loss = - mean over t < H of u r log student(y_t),  u = log teacher(y_t) - log student(y_t)

with u held constant and r the ratio to the policy that sampled, under PPO's clip. In POPD the horizon H grows with the optimizer
steps, and no more than H tokens are sampled; in TOPD it is one number. H is `distillation_length`, and the mean is over the
distilled tokens. A rollout that is cut at the horizon counts like any other.

The paper's schedule and its ends are not known to us; ours is linear. Differences to the paper: the teacher is the model itself,
which has read the solution, there a larger one.
"""

from typing import Any

import torch

from ..teacher.contexts import Moment
from .base import Method, RowFacts
from .groups import policy_gradient
from .opsd import solution_read
from .papers import arxiv_paper


def sampled_loss(facts: RowFacts, settings: Any, moment: Moment) -> torch.Tensor:
    """-u r log student(y_t), (n,)."""
    advantage = (facts.given["view_log_probs"][0] - facts.log_prob).detach()
    return policy_gradient(facts, advantage, settings)


POPD = Method(
    name="POPD",
    contexts=solution_read,
    contexts_from_rows=True,
    loss=sampled_loss,
    pointwise=True,
    has_target=False,
    reads_views=True,
    reads_old=True,
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper(
        "Are Full Rollouts Necessary for On-Policy Distillation?",
        "2605.31490",
        "zhang2026rollouts",
        "Yaocheng Zhang and Jiajun Chai and Yuqian Fu and Songjun Tu and Xiaohan Wang and Wei Lin and Guojun Yin and Qichao Zhang and Yuanheng Zhu and Dongbin Zhao",
    ),
)
