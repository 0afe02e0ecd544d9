# SPDX-License-Identifier: Apache-2.0
"""The distilled part of a rollout: constant, growing, and where sampling stops."""

import pytest
import torch
from steps import loss_of_rows, make_trainer

from trl_opsd import OGLSSDTrainer

GROWING = {"distillation_length": "2..8 in 4"}


def test_the_length_grows_linearly_and_then_stays(make_args):
    args = make_args(distillation_length="2..6 in 4")
    assert [args.distillation_length_at(step) for step in range(7)] == [2, 3, 4, 5, 6, 6, 6]
    assert args.distillation_length_at(None) == 6


def test_it_grows_to_the_longest_rollout_at_most(make_args):
    args = make_args(distillation_length="2..1000 in 4", max_completion_length=8)
    assert [args.distillation_length_at(step) for step in (0, 2, 4, 10**6, None)] == [2, 5, 8, 8, 8]


@pytest.mark.parametrize("length", [None, 3, "3"])
def test_without_a_start_it_is_the_same_at_every_step(make_args, length):
    args = make_args(distillation_length=length)
    assert {args.distillation_length_at(step) for step in (0, 1, 100, None)} == {length and int(length)}


@pytest.mark.parametrize("step, length", [(0, 2), (2, 5), (4, 8)])
def test_a_growing_length_is_the_constant_one_of_its_step(build, dataset, step, length):
    growing, constant = build(**GROWING), build(distillation_length=length)
    growing.state.global_step = step
    rows = dataset.select(range(4))
    loss, batch = loss_of_rows(growing, rows)
    wanted, _ = loss_of_rows(constant, rows)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0.0)  # TRL shuffles the rows
    assert batch["distillation_mask"].shape[1] <= length
    assert growing._metrics["train"]["distillation_length"] == [length]


def test_evaluation_takes_the_length_that_training_ends_with(build, dataset):
    trainer = build(distillation_length="2..6 in 4", eval_dataset=dataset)
    losses = []
    for step in (0, 4):
        trainer.state.global_step = step
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def lengths_sampled(trainer, monkeypatch):
    """Limits that `generate` was called with."""
    limits, generate = [], trainer.model.generate

    def watched(*args, generation_config, **kwargs):
        limits.append(generation_config.max_new_tokens)
        return generate(*args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", watched)
    return limits


def test_sampling_stops_where_distillation_does(build, dataset, monkeypatch):
    settings = {"distillation_length": "2..10 in 4", "max_steps": 6, "max_completion_length": 10}
    trainer = build(given=False, **settings, eval_dataset=dataset, eval_strategy="steps", eval_steps=2)
    limits = lengths_sampled(trainer, monkeypatch)
    trainer.train()
    # Evaluations, 2 batches each, behind steps 2, 4 and 6.
    assert limits == [2, 4, 10, 10, 6, 8, 10, 10, 10, 10, 10, 10]
    lengths = [entry["distillation_length"] for entry in trainer.state.log_history if "distillation_length" in entry]
    assert lengths == [2, 4, 6, 8, 10, 10]


def test_whole_rollouts_are_sampled_where_their_end_decides_what_is_trained(
    make_model, make_args, dataset, tokenizer, build
):
    group = {"num_generations": 4, **GROWING}
    trainer = make_trainer(make_model, make_args, dataset, tokenizer, OGLSSDTrainer, **group)
    assert not trainer._samples_distilled_only() and trainer.distilled_length() == 2
    for settings in ({"reward_weight": 0.5, "num_generations": 2}, {"mask_truncated_completions": True}):
        assert not build(**GROWING, **settings)._samples_distilled_only()
    assert not build(distillation_length=4)._samples_distilled_only() and build(**GROWING)._samples_distilled_only()


def test_a_guard_leaves_out_what_grows_by_plan(build):
    def watched(**settings):
        trainer = build(**settings)
        guard = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "CollapseGuard")
        return {limit.key for limit in guard.limits}

    everything = watched()
    assert everything - watched(**GROWING, mask_truncated_completions=True) == {"divergence", "student_entropy"}
    assert everything - watched(**GROWING) == {"divergence", "student_entropy", "completions/mean_length"}
