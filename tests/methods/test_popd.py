# SPDX-License-Identifier: Apache-2.0
"""POPD and TOPD: a whole step by hand from raw logits, the horizon, and settings."""

from dataclasses import replace

import pytest
import torch
from groups import bare, ids_of, logits_of, privileged
from pages import assert_same_gradients, assert_same_step, moved, prepared, raw_logits, weights_after_steps, whole_step

from trl_opsd.trainers.popd import POPDConfig, POPDTrainer

SMALL = {"max_completion_length": 40, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture
def build(build_group):
    return build_group


def loss_by_hand(trainer, student, teacher, rows, horizon):
    """Mean over the first `horizon` tokens of -u log q, with gradient, and how many they are."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    total, count = 0.0, 0
    for row, completion in zip(rows, completions, strict=True):
        prefix = completion[:horizon]
        read = privileged(trainer, row, args.teacher_prompt_template, row["solution"])
        log_p = (logits_of(teacher, read, prefix) / heat).log_softmax(-1)
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, prefix) / heat).log_softmax(-1)
        for t, token in enumerate(prefix):
            total = total - (log_p[t, token] - log_q[t, token]).item() * log_q[t, token]
            count += 1
    return total / count, count


@pytest.mark.parametrize(
    ("length", "horizon"), [(None, 40), (30, 30), (3, 3), ("4..20 in 8", 4)], ids=["OPD", "long", "TOPD", "POPD"]
)
def test_a_step_is_the_policy_gradient_of_the_prefix_from_raw_logits(build, dataset, length, horizon):
    trainer = build(POPDTrainer, **SMALL, distillation_length=length, temperature=1.2)
    teacher = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    batch = prepared(trainer, rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, count = loss_by_hand(trainer, student, teacher, rows, horizon)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), rel=1e-6, abs=1e-7)  # the read view is kept in float32
    assert_same_gradients(trainer.model, student)
    assert batch["distillation_mask"].sum() == count


def test_a_horizon_beyond_every_rollout_is_plain_distillation_of_the_sampled_token(build, dataset):
    rows = [dataset[index] for index in (0, 3, 5, 7)]
    results = []
    for length in (None, 39):
        trainer = build(POPDTrainer, **SMALL, distillation_length=length)
        moved(trainer)
        results.append(whole_step(trainer, rows))
    assert_same_step(*results, rel=1e-12)


def test_behind_the_horizon_nothing_is_learnt(build, dataset):
    """Rollouts that differ behind the horizon alone give one gradient."""
    rows, results = [dataset[0]] * 4, []
    for texts in (("1+2=3 so", "wait, 10"), ("1+2=3 no", "wait, 12, no")):
        trainer = build(POPDTrainer, texts=texts, **SMALL, distillation_length=4)
        moved(trainer)
        results.append(whole_step(trainer, rows))
    assert_same_step(*results, rel=1e-12)


def test_the_horizon_grows_to_its_end_and_sampling_with_it(build, dataset):
    trainer = build(POPDTrainer, **SMALL, distillation_length="4..20 in 8")
    lengths = []
    for step in (0, 4, 8, 100):
        trainer.state.global_step = step
        batch = prepared(trainer, [dataset[index] for index in (0, 3, 5, 7)])
        lengths.append((trainer.distilled_length(), trainer.generation_config.max_new_tokens))
        assert batch["distillation_mask"].size(1) <= lengths[-1][0]
    assert lengths == [(4, 4), (12, 12), (20, 20), (20, 20)]


def test_rollouts_that_are_cut_at_the_horizon_count_and_may_not_be_masked(build, dataset, make_args):
    trainer = build(POPDTrainer, **{**SMALL, "max_completion_length": 5}, distillation_length="3..4 in 2")
    batch = prepared(trainer, [dataset[index] for index in (0, 3, 5, 7)])
    assert batch["distillation_mask"].any(1).all() and batch["distillation_mask"].sum(1).tolist() == [3] * 4
    with pytest.raises(ValueError, match=r"mask_truncated_completions=True is not possible.*cut at the horizon"):
        make_args(POPDConfig, mask_truncated_completions=True)


def test_one_by_four_equals_two_by_two_accumulation(build):
    settings = {"max_completion_length": 40, "max_steps": 2, "distillation_length": "3..6 in 2"}
    weights, start = weights_after_steps(build, POPDTrainer, **settings)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"distillation_length": "8..4 in 2"}, "distillation_length='8..4 in 2' is not valid"),
        ({"distillation_length": 0}, "distillation_length=0 is not valid"),
        ({"max_completion_length": 256}, "distillation_length='256..1024 in 50' has nowhere to grow to"),
        ({"divergence": "jsd"}, "divergence='jsd' is not possible"),
        ({"clip": "symmetric"}, "clip='symmetric' is not possible"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(make_args, bad, told):
    with pytest.raises(ValueError, match=told):
        make_args(POPDConfig, **bad)


def test_the_default_horizon_grows_and_is_ours():
    args = POPDConfig(output_dir="out", use_cpu=True, bf16=False)
    # arXiv 2605.31490 gives neither schedule nor ends to us: linear, a quarter of the rollout to all of it.
    assert [args.distillation_length_at(step) for step in (0, 25, 50)] == [256, 640, 1024]
    assert args.max_completion_length == 1024 and not args.mask_truncated_completions


def test_a_pointwise_loss_takes_the_step_of_the_same_loss_by_rows(build_group, dataset):
    rows = [dataset[index] for index in range(4)]
    steps = []
    for pointwise in (True, False):
        owner = type("Changed", (POPDTrainer,), {"method": replace(POPDTrainer.method, pointwise=pointwise)})
        trainer = build_group(owner, ("so 12", "wait", "a", "it is 3"), distillation_length=6, max_completion_length=30)
        steps.append((*whole_step(trainer, rows), dict(trainer.diagnostics["train"].means(lambda sums: sums, "cpu"))))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-12)
    for name, gradient in steps[0][1].items():
        torch.testing.assert_close(gradient, steps[1][1][name], rtol=0, atol=1e-12)
    assert steps[0][2] == pytest.approx(steps[1][2], rel=1e-6)


def test_pointwise_is_for_a_loss_alone():
    with pytest.raises(ValueError, match="pointwise is for a loss alone"):
        replace(POPDTrainer.method, extras=lambda group, settings, moment: [None] * len(group))
