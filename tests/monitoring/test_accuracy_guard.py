# SPDX-License-Identifier: Apache-2.0
"""The accuracy guard: it hears a fall of rewards or held-out accuracy that is more than noise, and nothing else."""

import random
import statistics
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from trl_opsd import OPSDTrainer
from trl_opsd.monitoring.accuracy_guard import AccuracyGuard, PooledReward, rollouts_per_step
from trl_opsd.monitoring.diagnostics import Diagnostics

ARGS = SimpleNamespace(
    divergence="forward_kl",
    gradient_accumulation_steps=1,
    steps_per_generation=1,
    num_iterations=1,
    generation_batch_size=64,
)


def reward_logs(chances, seed=0, scale=1.0, shift=0.0):
    """One log a step: 64 rollouts, each right with the step's chance."""
    generator = random.Random(seed)
    for step, chance in enumerate(chances, 1):
        rewards = [shift + scale * (generator.random() < chance) for _ in range(64)]
        yield {"step": step, "reward": statistics.fmean(rewards), "reward_std": statistics.stdev(rewards)}


def play(logs, guard=None, args=ARGS):
    """Log one after the other; returns the warnings and the control."""
    guard, control = guard or AccuracyGuard(), TrainerControl()
    state = SimpleNamespace(log_history=[], is_world_process_zero=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for log in logs:
            state.log_history.append(log)
            guard.on_log(args, state, control)
    return [str(warning.message) for warning in caught], control


def falling(start, end, num_steps=40):
    return [start + (end - start) * step / (num_steps - 1) for step in range(num_steps)]


@pytest.mark.parametrize("scale", [1.0, 25.0])
@pytest.mark.parametrize("shift", [0.0, -7.0])
def test_rewards_that_fall_by_more_than_noise_are_told_once_whatever_their_scale(scale, shift):
    chances = falling(0.6, 0.3)
    if shift:  # a tenth of the start is more here
        scale *= 10
    (text,), control = play(reward_logs(chances, scale=scale, shift=shift))
    assert text.startswith("Accuracy guard at step ") and "mean reward of rollouts" in text
    assert "Accuracy falls though the teacher is right" in text and not control.should_training_stop


@pytest.mark.parametrize("chances", [[0.35] * 60, falling(0.35, 0.9), falling(0.9, 0.88, 60)], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_noise_a_gain_and_a_fall_that_matters_to_nobody_are_silent(chances, seed):
    assert play(reward_logs(chances, seed))[0] == []


def test_too_few_rollouts_are_silent_and_windows_never_overlap():
    assert play(reward_logs([0.9] * 8 + [0.1] * 7))[0] == []
    assert len(play(reward_logs([0.9] * 8 + [0.1] * 8))[0]) == 1


def test_rollouts_that_resemble_each_other_count_as_noise():
    """Logs of 64 rollouts of which all are right or all wrong: their own spread says nothing."""
    logs = [{"step": step, "reward": float(step % 3 > 0), "reward_std": 0.0} for step in range(1, 9)]
    pooled = PooledReward.of((log["reward"], log["reward_std"], 64) for log in logs)
    assert pooled.num_rollouts == 512 and pooled.error > 0.15


def test_logs_without_a_reward_are_passed_over():
    logs = list(reward_logs([0.9] * 8 + [0.1] * 8))
    empty = {"step": 8, "reward": float("nan"), "reward_std": float("nan")}
    assert len(play([*logs[:8], {"step": 8, "eval/avg@k": 0.4}, empty, *logs[8:]])[0]) == 1


def test_rewards_that_change_by_plan_are_not_watched():
    assert play(reward_logs([0.9] * 8 + [0.1] * 8), AccuracyGuard(watches_rewards=False))[0] == []


@pytest.mark.parametrize(("high", "count"), [(-0.04, 1), (0.01, 0)])
def test_held_out_accuracy_is_told_where_its_whole_interval_lies_below_the_base(high, count):
    log = {"step": 25, "eval/gain": -0.09, "eval/gain_low": -0.14, "eval/gain_high": high}
    texts, control = play([log, {**log, "step": 50}], AccuracyGuard("stop"))
    assert len(texts) == count and control.should_training_stop == bool(count)
    for text in texts:
        assert "-9.0 points, 95 % interval [-14.0, -4.0]" in text and "guard='stop'" in text


@pytest.mark.parametrize(
    ("start", "divergence", "told"),
    [
        ({"entropy_gap": -0.08, "divergence/right": 0.26, "divergence/wrong": 0.285}, "forward_kl", (True, True)),
        ({"entropy_gap": -0.08, "divergence/right": 0.02, "divergence/wrong": 0.2}, "reverse_kl", (False, False)),
        ({"entropy_gap": 0.12, "divergence/right": 0.062, "divergence/wrong": 0.109}, "forward_kl", (False, False)),
        ({}, "forward_kl", (False, False)),
    ],
)
def test_what_the_first_log_says_about_the_teacher_becomes_the_advice(start, divergence, told):
    logs = list(reward_logs([0.9] * 8 + [0.1] * 8))
    logs[0] |= {"divergence": 0.3} | start
    (text,), _ = play(logs, args=SimpleNamespace(**{**vars(ARGS), "divergence": divergence}))
    assert ("divergence='reverse_kl'" in text, "divergence/right 0.26" in text) == told


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="action='loud'"):
        AccuracyGuard("loud")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 4),
        ({"gradient_accumulation_steps": 2}, 8),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 8),
        ({"num_iterations": 2}, 2),
    ],
)
def test_rollouts_of_a_step_are_counted_as_they_are_sampled(make_args, settings, expected):
    assert rollouts_per_step(make_args(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("warn", True)]),
        ({"guard": "stop"}, [("stop", True)]),
        ({"guard": "off"}, []),
        (
            {
                "distillation_length": "2..8 in 2",
            },
            [("warn", False)],
        ),
    ],
)
def test_the_config_adds_it(make_model, make_args, dataset, tokenizer, settings, expected):
    trainer = OPSDTrainer(make_model(), args=make_args(**settings), train_dataset=dataset, processing_class=tokenizer)
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, AccuracyGuard)]
    assert [(callback.action, callback.watches_rewards) for callback in found] == expected


def test_the_divergence_of_right_and_wrong_rollouts_is_logged_apart():
    diagnostics, ones = Diagnostics(), torch.ones(3, 2)
    divergence = torch.tensor([[1.0, 2.0], [4.0, 9.0], [20.0, 30.0]])
    values = {name: ones for name in ("clipped_share", "student_entropy", "target_entropy", "top_token_agreement")}
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    outcomes = torch.tensor([1, 0, -1])
    diagnostics.add({**values, "divergence": divergence}, mask, torch.arange(3), outcomes=outcomes)
    means = diagnostics.means(lambda sums: sums, torch.device("cpu"))
    assert (means["divergence/right"], means["divergence/wrong"], means["divergence"]) == (1.5, 4.0, 57 / 5)


def test_a_run_logs_what_it_reads(make_model, make_args, dataset, tokenizer):
    trainer = OPSDTrainer(make_model(), args=make_args(), train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert {"reward", "reward_std", "step"} <= trainer.state.log_history[0].keys()
