# SPDX-License-Identifier: Apache-2.0
"""The distilled part of a rollout: constant, growing, and where sampling stops."""

import pytest
import torch
from steps import loss_of_rows, make_trainer

from trl_opsd import OGLSSDConfig, OGLSSDTrainer

GROWING = {"distillation_length_start": 2, "distillation_length_steps": 4}


def test_the_length_grows_linearly_and_then_stays(make_args):
    args = make_args(**GROWING, distillation_length=6)
    assert [args.distillation_length_at(step) for step in range(7)] == [2, 3, 4, 5, 6, 6, 6]


@pytest.mark.parametrize("settings, end", [({}, 8), ({"distillation_length": 5}, 5)])
def test_without_a_distilled_length_it_grows_to_the_longest_rollout(make_args, settings, end):
    args = make_args(**GROWING, **settings)
    assert args.distillation_length_at(4) == end == args.distillation_length_at(10**6)


@pytest.mark.parametrize("length", [None, 3])
def test_without_a_start_it_is_the_same_at_every_step(make_args, length):
    args = make_args(distillation_length=length)
    assert {args.distillation_length_at(step) for step in (0, 1, 100)} == {length}


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
    trainer = build(**GROWING, distillation_length=6, eval_dataset=dataset)
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
    settings = {**GROWING, "max_steps": 6, "sample_distilled_only": True, "max_completion_length": 10}
    trainer = build(given=False, **settings, eval_dataset=dataset, eval_strategy="steps", eval_steps=2)
    limits = lengths_sampled(trainer, monkeypatch)
    trainer.train()
    # Evaluations, 2 batches each, behind steps 2, 4 and 6.
    assert limits == [2, 4, 10, 10, 6, 8, 10, 10, 10, 10, 10, 10]
    lengths = [entry["distillation_length"] for entry in trainer.state.log_history if "distillation_length" in entry]
    assert lengths == [2, 4, 6, 8, 10, 10]


def test_a_run_stopped_short_has_the_loss_of_its_first_tokens(build, dataset):
    rows, losses = dataset.select(range(4)), []
    for settings in ({"distillation_length": 3, "sample_distilled_only": True}, {"max_completion_length": 3}):
        trainer = build(given=False, temperature=1e-4, loss_temperature=1.0, **settings)  # greedy in effect
        loss, batch = loss_of_rows(trainer, rows)
        assert batch["completion_ids"].shape[1] == 3
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_a_guard_leaves_out_what_grows_by_plan(build):
    def watched(**settings):
        trainer = build(**settings)
        guard = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "CollapseGuard")
        return {limit.key for limit in guard.limits}

    everything = watched()
    assert everything - watched(**GROWING) == {"divergence", "student_entropy"}
    moved = everything - watched(**GROWING, sample_distilled_only=True)
    assert moved == {"divergence", "student_entropy", "completions/mean_length"}


def test_a_method_that_reads_the_answer_samples_whole_rollouts(make_model, make_args, dataset, tokenizer):
    settings = {"num_generations": 4, "distillation_length": 4, "sample_distilled_only": True}
    with pytest.raises(ValueError, match=r"sample_distilled_only=True, but OGLS-SD .* distillation_length alone"):
        make_trainer(make_model, make_args, dataset, tokenizer, OGLSSDTrainer, **settings)
    assert OGLSSDConfig.__dataclass_fields__["sample_distilled_only"].default is False
