# SPDX-License-Identifier: Apache-2.0
"""Rethinking OPD: a policy gradient over likely tokens, each rewarded by its log-ratio (arXiv 2604.13016).

    r_k = w_k (log teacher(k) - log student(k)),  loss = - mean over t of the sum over k of r_k log student(k)

with r_k held constant and w the student's probabilities over the set, renormalised. The set is the 16 likeliest tokens of the
student, of the teacher, of both or of either; log-probabilities are those of the whole vocabulary. With all tokens this is
the gradient of the reverse KL. With some it is not that of the KL between the renormalised sides: where the rewards of the
set sum to something, all its tokens are pushed one way. `support_size=0` rewards the sampled token alone.

The ratio to the policy that sampled enters, under PPO's clip with a dual clip of 3, for the sampled token; of 16 tokens an older
policy's log-probabilities are not kept, so there a generation batch may be used for one update only. Difference to the
paper: the teacher is the model itself, which has read the solution, there a larger one that the student was first tuned to.
`reward_weight=1` adds GRPO, as the official code can.
"""

from typing import Any

import torch

from ..losses import Facts
from ..teacher.contexts import Moment
from .base import Method
from .groups import policy_ratio
from .opsd import privileged_contexts
from .papers import arxiv_paper


def sampled_ratio(facts: Facts, settings: Any, moment: Moment) -> torch.Tensor:
    """(n,) the ratio of the sampled token under PPO's clip; 1 where a set is rewarded."""
    if settings.support_size:
        return torch.ones_like(facts.log_prob)
    return policy_ratio(facts, facts.log_prob_ratio, settings)


RETHINKING_OPD = Method(
    name="Rethinking OPD",
    contexts=privileged_contexts,
    contexts_from_rows=True,
    token_weight=sampled_ratio,
    reads_old=True,
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper(
        "Rethinking On-Policy Distillation of Large Language Models: Phenomenology, Mechanism, and Recipe",
        "2604.13016",
        "li2026rethinking",
        "Yaxuan Li and Yuxin Zuo and Bingxiang He and Jinqian Zhang and Chaojun Xiao and Cheng Qian and Tianyu Yu and Huan-ang Gao and Wenkai Yang and Zhiyuan Liu and Ning Ding",
    ),
)
