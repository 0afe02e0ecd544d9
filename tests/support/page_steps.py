# SPDX-License-Identifier: Apache-2.0
"""What the tests of several methods' pages share: steps of given groups and their gradients by hand."""

import torch


def moved(trainer, scale=0.02, seed=3):
    """Move the student's weights, so that the teacher's, where it has its own, lag behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def prepared(trainer, rows):
    """The first micro-batch of a generation batch of `rows`."""
    trainer._buffered_inputs, trainer._step = None, 0
    return trainer._prepare_inputs(list(rows))


def raw_logits(model, context, completion):
    """(T, V) logits that predict `completion`, with gradient, by one unpadded row of the model's own forward."""
    ids = torch.tensor([context + completion])
    return model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]


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
