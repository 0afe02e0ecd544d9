# SPDX-License-Identifier: Apache-2.0
"""What the tests of methods' pages share: steps of given groups, and their second derivation by hand."""

import random

import pytest
import torch
from groups import EXACT, bare, ids_of

from trl_opsd.teacher.contexts import Moment

MOMENT = Moment(random.Random(0))


def whole_step(trainer, rows):
    """Loss of an optimizer step over `rows` and the gradient of every trained parameter by name."""
    trainer._buffered_inputs, trainer._step = None, 0
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._prepare_inputs(list(rows))
    total = 0.0
    for batch in trainer._buffered_inputs:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        total += loss.item()
    return total, gradients_of(trainer.model)


def gradients_of(model):
    """Of every parameter that trains, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def student_of(trainer):
    """A copy of the trained model without the trainer's patch, in float64 and without gradients."""
    model = bare(trainer)
    model.zero_grad()
    return model.eval()


def moved(trainer, size=0.05):
    """Move the student away from where it started, so that it differs from a frozen teacher."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def assert_same_step(got, wanted, rel=1e-5, **tolerance):
    """Two results of `whole_step`, or of one and a derivation by hand, are equal; the gradients by their norm."""
    assert got[0] == pytest.approx(wanted[0], **{**EXACT, **tolerance})
    assert got[1].keys() == wanted[1].keys()
    scale = max(gradient.norm() for gradient in wanted[1].values())
    assert scale > 0
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= rel * scale, name


def token_log_probs(logits, tokens, temperature=1.0):
    """log p(y_t) (T,) from raw logits (T, V)."""
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


def raw_logits(model, context, completion):
    """(T, V) that predict `completion`, with gradient, by a plain forward of one row."""
    return model(input_ids=torch.tensor([context + completion]), use_cache=False).logits[0, len(context) - 1 : -1]


def prepared(trainer, rows):
    """The first micro-batch of a generation batch of `rows`."""
    trainer._buffered_inputs, trainer._step = None, 0
    return trainer._prepare_inputs(list(rows))


def an_older_policy(trainer, batch):
    """Let another policy than the student have sampled the batch; log-probabilities (T,) under it by a rollout's index."""
    with torch.no_grad():
        now = trainer.policy_logps(trainer.model, batch)[0]
    shift = torch.randn(now.shape, generator=torch.Generator().manual_seed(5), dtype=now.dtype)
    batch["old_per_token_logps"] = now + 0.3 * shift
    return dict(zip(batch["rollout_index"].tolist(), batch["old_per_token_logps"], strict=True))


def assert_same_gradients(ours, hand, rtol=1e-5, least=1e-6):
    """Gradients of two models agree in every parameter, relative to the largest of that parameter, and none is 0."""
    for (name, own), (_, other) in zip(ours.named_parameters(), hand.named_parameters(), strict=True):
        largest = other.grad.abs().max().item()
        assert largest > least, name
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=rtol * largest, msg=name)


def weights_after_steps(build, trainer_class, splits=((8, 1), (4, 2), (2, 4)), **settings):
    """Flat weights after training with each (per_device_train_batch_size, gradient_accumulation_steps), and the start's."""
    results, start = [], None
    for size, steps in splits:
        trainer = build(
            trainer_class,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=1e9,
            **settings,
        )
        start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        results.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    return results, start


def grpo_by_hand(trainer, model, rows, factors=None):
    """GRPO's loss of groups of four by its definition, and what has its gradient: - sum of f A log q / number of tokens.

    A is the reward by the group's mean and deviation, right where the completion boxes anything; `factors` are f of each rollout's
    tokens, 1 without them.
    """
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    rewards = torch.tensor([float("boxed" in trainer.tokenizer.decode(ids)) for ids in completions])
    grouped = rewards.view(-1, 4)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    value, surrogate = 0.0, 0.0
    for index, (row, ids, advantage) in enumerate(zip(rows, completions, advantages, strict=True)):
        prompt = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        log_prob = token_log_probs(raw_logits(model, prompt, ids), ids, trainer.args.temperature)
        factor = torch.ones(len(ids)) if factors is None else torch.tensor(factors[index])
        surrogate = surrogate - advantage * (factor * log_prob).sum()
        value -= advantage * factor.sum()
    count = sum(map(len, completions))
    return value / count, surrogate / count
