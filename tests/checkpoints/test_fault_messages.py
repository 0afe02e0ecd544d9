# SPDX-License-Identifier: Apache-2.0
"""What goes wrong inside a process: a full disk, a reward that raises, a completion at the edge."""

import copy
import math
import resource
from collections import Counter
from dataclasses import replace

import pytest
import torch

from trl_opsd import OGLSSDTrainer, OPSDTrainer
from trl_opsd.checkpoints.manifest import checkpoint_state, complete_steps
from trl_opsd.rewards import accuracy_reward, skip_errors


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, tmp_path):
    def build(trainer_class=OPSDTrainer, reward_funcs=None, **settings):
        settings = {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-2, "max_grad_norm": 1.0, **settings}
        return trainer_class(
            model=make_model(),
            args=make_args(trainer_class.config_class, **settings),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
            reward_funcs=reward_funcs,
        )

    return build


def fail_from_step_two(trainer, monkeypatch, tmp_path, share):
    """From the second save on, no file may be longer than a share of the model's: what a full disk does to writers."""
    save = trainer._save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args):
        if trainer.state.global_step == 1:
            return save(*args)
        length = (tmp_path / "run" / "checkpoint-1" / "model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * length), hard))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(trainer, "_save_checkpoint", limited)


@pytest.mark.parametrize("share", [0.5, 1.1], ids=["the model does not fit", "the optimizer does not fit"])
def test_a_save_that_fails_names_its_folder_and_leaves_the_earlier_checkpoint(build, tmp_path, monkeypatch, share):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = build(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    trainer = build(**settings, output_dir=str(tmp_path / "run"))
    fail_from_step_two(trainer, monkeypatch, tmp_path, share)
    with pytest.raises(Exception, match=r"(?i)too large|failed writing|write failed|unexpected pos") as raised:
        trainer.train()
    (note,) = raised.value.__notes__
    for text in (
        "run/checkpoint-2 was being saved",
        "MiB are free",
        "newest complete checkpoint is",
        "run/checkpoint-1.",
    ):
        assert text in note
    assert complete_steps(tmp_path / "run") == {1: "complete", 2: "half-written"}
    resumed = build(**settings)
    with pytest.warns(UserWarning, match="checkpoint-2"):
        resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert checkpoint_state(tmp_path / "run" / "checkpoint-3") == "complete"


def raises_on_even_prompts(completions, prompts, **columns):
    if any(len(prompt[-1]["content"]) % 4 == 3 for prompt in prompts):
        raise KeyError("a row the function cannot read")
    return [1.0] * len(completions)


async def raises_later(**columns):
    return raises_on_even_prompts(**columns)


@pytest.mark.parametrize("reward", [raises_on_even_prompts, raises_later])
def test_a_reward_that_raises_stops_the_run_by_default_and_is_named(build, reward):
    trainer = build(reward_funcs=reward)
    with pytest.raises(KeyError, match="cannot read") as raised:
        trainer.train()
    assert f"reward function '{reward.__name__}' on row" in raised.value.__notes__[0]


@pytest.mark.parametrize("reward", [raises_on_even_prompts, raises_later])
def test_skipped_rewards_are_counted_in_the_log_and_the_run_goes_on(build, reward):
    trainer = build(reward_funcs=[skip_errors(reward)], max_steps=2)
    with pytest.warns(UserWarning, match=f"{reward.__name__}' raised KeyError"):
        trainer.train()
    counts = [entry[f"rewards/{reward.__name__}/errors"] for entry in trainer.state.log_history[:2]]
    bad = sum(len(row["prompt"][-1]["content"]) % 4 == 3 for row in trainer.train_dataset)
    assert sum(counts) == bad > 0  # two batches of four are the eight rows
    assert all(entry[f"rewards/{reward.__name__}/mean"] == 1.0 for entry in trainer.state.log_history[:2])


def test_a_run_without_errors_logs_zero_of_them(build):
    trainer = build(reward_funcs=skip_errors(accuracy_reward))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/accuracy_reward/errors"] == 0


def test_a_rollout_whose_reward_raised_is_neither_right_nor_wrong(build):
    def reward(completions, **columns):
        if len(completions) > 1:
            raise ValueError("one at a time")
        calls["all"] += 1
        if calls["all"] % 4 == 1:
            raise ValueError("the first of each group")
        return [float(calls["all"] % 2)]

    calls = Counter()
    settings = {"num_generations": 4, "distillation_length": None}
    groups, contexts = [], OGLSSDTrainer.method.contexts

    class Recorded(OGLSSDTrainer):
        method = replace(
            OGLSSDTrainer.method, contexts=lambda group, *rest: groups.append(group) or contexts(group, *rest)
        )

    trainer = build(Recorded, reward_funcs=skip_errors(reward), **settings)
    with pytest.warns(UserWarning, match="the first of each group"):
        trainer.train()
    assert [[rollout.reward for rollout in group] for group in groups] == [[None, 0.0, 1.0, 0.0]]
    assert trainer.state.log_history[0]["rewards/reward/errors"] == 1


def give(trainer, monkeypatch, completions):
    monkeypatch.setattr(
        trainer, "_generate_single_turn", lambda prompt_ids, *a, **k: (copy.deepcopy(completions), None)
    )


def edges(tokenizer, longest):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    digits = tokenizer("1234567890", add_special_tokens=False)["input_ids"]
    return {
        "the end alone": [end],
        "special tokens alone": [*[token for token in tokenizer.all_special_ids if token not in (end, pad)][:2], end],
        "as long as allowed, without an end": digits[:longest],
        "as long as allowed, with an end": [*digits[: longest - 1], end],
    }


@pytest.mark.parametrize("trainer_class", [OPSDTrainer, OGLSSDTrainer])
def test_completions_at_the_edge_are_trained_token_by_token(build, monkeypatch, trainer_class):
    settings = {"num_generations": 4, "distillation_length": None} if trainer_class is OGLSSDTrainer else {}
    trainer = build(trainer_class, reward_funcs=lambda completions, **columns: [0.0] * len(completions), **settings)
    completions = list(edges(trainer.tokenizer, 8).values())
    give(trainer, monkeypatch, completions)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(list(trainer.train_dataset.select([0] * 4)))
    assert batch["distillation_mask"].sum(1).tolist() == [len(ids) for ids in completions]
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) and entry["divergence"] > 0
    assert entry["completions/clipped_ratio"] == 0.25
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_batch_in_which_every_completion_is_masked_changes_nothing(build, monkeypatch, reduction):
    trainer = build(mask_truncated_completions=True, loss_reduction=reduction)
    give(trainer, monkeypatch, [edges(trainer.tokenizer, 8)["as long as allowed, without an end"]] * 4)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.warns(UserWarning, match="Every rollout of a generation batch was cut"):
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_single_token_left_by_the_skipped_first_ones_gives_no_nan(build, monkeypatch):
    trainer = build(num_loss_tokens_to_skip=1)
    give(trainer, monkeypatch, [[trainer.tokenizer.eos_token_id]] * 4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
