# SPDX-License-Identifier: Apache-2.0
"""Runs of a page that leaves TRL's policy gradient as it is, beside TRL's own trainer on the same rollouts."""

import copy
import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

STEPS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "max_completion_length": 16,
    "epsilon_high": 0.28,
    "chat_template_kwargs": {"enable_thinking": False},
}


def reward_by_length(completions, **columns):
    return [float(len(completion[0]["content"]) % 3 == 0) for completion in completions]


def history(trainer_class, config_class, make_model, make_args, dataset, tokenizer, **settings):
    """What three steps log."""
    trainer = trainer_class(
        model=make_model(torch.float64),
        reward_funcs=reward_by_length,
        args=make_args(config_class, **{**STEPS, **settings}),
        train_dataset=dataset,
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_steps_of_grpo(trainer_class, make_model, make_args, dataset, tokenizer, **settings):
    """Losses agree to 1e-6, and gradient norms to 1e-7 of themselves at first, to 1e-6 once AdamW has magnified roundings."""
    machine = (make_model, make_args, dataset, tokenizer)
    ours = history(trainer_class, trainer_class.config_class, *machine, **settings)
    sampling = {name: value for name, value in settings.items() if name in ("temperature", "top_p", "top_k")}
    theirs = history(GRPOTrainer, GRPOConfig, *machine, **sampling)
    assert len(ours) == len(theirs) == STEPS["max_steps"]
    for own, other, rel in zip(ours, theirs, (1e-7, 1e-6, 1e-6), strict=True):
        assert own["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=rel)
        assert own["reward"] == other["reward"]
    assert sum(own["grad_norm"] for own in ours) > 0.1


def group_advantages(rewards):
    """TRL's, of one group."""
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (deviation + 1e-4) for r in rewards]


def clipped_terms(log_prob, before, advantage, low, high):
    """-min(r A, clip(r) A) of one token, with gradient; `before` and `advantage` are numbers."""
    ratio = (log_prob - before).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
