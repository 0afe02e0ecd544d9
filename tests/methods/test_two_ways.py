# SPDX-License-Identifier: Apache-2.0
"""A method may have a loss and advantages: then both are minimised in one step."""

from dataclasses import replace

import torch
from groups import ids_of
from pages import assert_same_step, raw_logits, student_of, token_log_probs, whole_step

from trl_opsd import OPSDConfig
from trl_opsd.methods import OPSD
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.trainers.self_distillation import SelfDistillationTrainer

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")


class BothWays(SelfDistillationTrainer):
    """loss (B,): the rollout's mean of (log q)^2; advantages: 1 plus the student's own log-probability."""

    config_class = OPSDConfig
    method = replace(
        OPSD,
        name="both",
        contexts=lambda group, settings, moment: [(TeacherContext("plain", None, read=1.0),) for _ in group],
        has_target=False,
        reads_views=True,
        loss=lambda facts, settings, moment: facts.log_prob.square().sum(-1) / facts.given["mask"].sum(-1),
        advantages=lambda facts, settings, moment: 1 + facts.log_prob,
    )


def test_a_loss_and_advantages_add_up_and_advantages_are_constants(build_group, dataset):
    trainer = build_group(BothWays, TEXTS, max_completion_length=30)
    model, rows = student_of(trainer), [dataset[index] for index in range(4)]
    own, policy, value, count = 0.0, 0.0, 0.0, 0
    for row, ids in zip(rows, trainer._generate_single_turn([None] * 4)[0], strict=True):
        prompt = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        log_prob = token_log_probs(raw_logits(model, prompt, ids), ids, trainer.args.temperature)
        advantages = 1 + log_prob.detach()
        own = own + log_prob.square().mean() / 4
        policy, value, count = policy - (advantages * log_prob).sum(), value - advantages.sum(), count + len(ids)
    (own + policy / count).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    loss, got = whole_step(trainer, rows)
    assert_same_step((loss, got), ((own + value / count).item(), gradients))
    assert torch.is_tensor(own) and abs(value / count) > 1e-2
