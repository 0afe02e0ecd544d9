# SPDX-License-Identifier: Apache-2.0
"""Rethinking OPD: a whole step by hand from raw logits for every set, its special cases, and settings."""

import math

import pytest
import torch
from groups import EXACT, bare, ids_of, logits_of, privileged
from pages import assert_same_gradients, assert_same_step, moved, prepared, raw_logits, weights_after_steps, whole_step

from trl_opsd import OPSDTrainer
from trl_opsd.trainers.popd import POPDTrainer
from trl_opsd.trainers.rethinking_opd import RethinkingOPDConfig, RethinkingOPDTrainer

SMALL = {
    "max_completion_length": 40,
    "num_generations": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
K = 5
SETS = {
    "student": lambda q, p: q,
    "target": lambda q, p: p,
    "union": lambda q, p: q | p,
    "intersection": lambda q, p: q & p,
}


@pytest.fixture
def build(build_group):
    return build_group


def rewarded(log_q, log_p, of):
    """Rewards of a position's tokens by token."""
    kept = SETS[of](*(set(log.argsort(descending=True)[:K].tolist()) for log in (log_q, log_p)))
    mass = sum(log_q[k].exp().item() for k in kept)
    return {k: log_q[k].exp().item() / mass * (log_p[k] - log_q[k]).item() for k in kept}


def loss_by_hand(trainer, student, teacher, rows, of, old=None):
    """The mean over tokens, with gradient; `of` None rewards the sampled token, with its ratio to `old`; and what was cut."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    total, count, cut = 0.0, 0, []
    for index, row in enumerate(rows):
        completion = completions[index]
        read = privileged(trainer, row, args.teacher_prompt_template, row["solution"])
        log_p = (logits_of(teacher, read, completion) / heat).log_softmax(-1)
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        for t, token in enumerate(completion):
            now = log_q[t].detach()
            if of is not None:
                total = total - sum(
                    reward * (log_q[t, k] - now[k]).exp() for k, reward in rewarded(now, log_p[t], of).items()
                )
            else:
                reward, ratio = (
                    (log_p[t, token] - now[token]).item(),
                    math.exp(now[token].item() - old[index][t].item()),
                )
                if (ratio > 1.2 if reward > 0 else ratio < 0.8) or ratio > 3:
                    cut.append((reward > 0, ratio > 3))
                else:
                    total = total - reward * ratio * (1 + log_q[t, token] - now[token])
            count += 1
    return total / count, cut


@pytest.mark.parametrize("of", SETS)
def test_a_step_equals_the_formula_from_raw_logits(build, dataset, of):
    trainer = build(RethinkingOPDTrainer, **SMALL, support_size=K, support_of=of, temperature=1.2)
    teacher = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    loss = trainer.compute_loss(trainer.model, prepared(trainer, rows))
    loss.backward()
    hand, _ = loss_by_hand(trainer, student, teacher, rows, of)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), **EXACT)
    assert_same_gradients(trainer.model, student)


def test_a_step_of_the_sampled_token_with_ratios_equals_the_formula_from_raw_logits(build, dataset):
    trainer = build(RethinkingOPDTrainer, **SMALL, support_size=0, temperature=1.2)
    teacher = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    batch = prepared(trainer, rows)
    with torch.no_grad():
        now = trainer.policy_logps(trainer.model, batch)[0]
    shift = torch.randn(now.shape, generator=torch.Generator().manual_seed(5), dtype=now.dtype)
    batch["old_per_token_logps"] = now + 0.7 * shift
    old = dict(zip(batch["rollout_index"].tolist(), batch["old_per_token_logps"], strict=True))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, cut = loss_by_hand(trainer, student, teacher, rows, None, old)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), **EXACT)
    assert_same_gradients(trainer.model, student)
    assert {rewarded for rewarded, _ in cut} == {True, False} and (False, True) in cut  # the dual clip acts too


def test_with_all_tokens_the_step_is_that_of_reverse_kl(build, dataset):
    """Identity 1, for k = V and the ratio 1."""
    rows, results = [dataset[index] for index in (0, 3, 5, 7)], []
    of_all = {"support_size": 10**6, "support_of": "union"}
    reverse = {"divergence": "reverse_kl", "clip": None, "temperature": 1.0}
    for trainer_class, settings in ((RethinkingOPDTrainer, of_all), (OPSDTrainer, reverse)):
        trainer = build(trainer_class, **SMALL, **settings)
        moved(trainer)
        results.append(whole_step(trainer, rows))
    assert_same_step(*results, rel=1e-9)


def test_the_sampled_token_alone_is_popd_without_a_horizon(build, dataset):
    rows, results = [dataset[index] for index in (0, 3, 5, 7)], []
    for trainer_class, settings in (
        (RethinkingOPDTrainer, {"support_size": 0}),
        (POPDTrainer, {"distillation_length": None}),
    ):
        trainer = build(trainer_class, **SMALL, **settings)
        moved(trainer)
        results.append(whole_step(trainer, rows)[1])
    assert_same_step((0.0, results[0]), (0.0, results[1]), rel=1e-6)  # the read view is kept in float32


def test_one_by_four_equals_two_by_two_accumulation(build):
    weights, start = weights_after_steps(
        build, RethinkingOPDTrainer, max_completion_length=40, num_generations=4, max_steps=2
    )
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"divergence": "reverse_kl"}, "divergence='reverse_kl' is not possible.*Leave it 'policy_reverse_kl'"),
        ({"clip": "token"}, "clip='token' is not possible"),
        ({"support_size": -1}, "support_size=-1.*0 or more"),
        ({"support_of": "teacher"}, "support_of='teacher'.*'intersection'"),
        ({"support_of": "union", "support_size": 0}, "support_of='union' with support_size=0"),
        ({"num_iterations": 2}, "support_size=16 with 2 updates.*num_iterations=2.*support_size to 0"),
        ({"steps_per_generation": 16, "gradient_accumulation_steps": 8}, "with 2 updates.*steps_per_generation=16"),
        ({"delta": 0.5}, "delta=0.5.*above 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(make_args, bad, told):
    with pytest.raises(ValueError, match=told):
        make_args(RethinkingOPDConfig, **bad)


def test_the_sampled_token_may_be_used_for_several_updates(make_args):
    assert make_args(RethinkingOPDConfig, support_size=0, num_iterations=3).num_iterations == 3


def test_the_defaults_are_the_papers():
    args = RethinkingOPDConfig(output_dir="out", use_cpu=True, bf16=False)
    # arXiv 2604.13016 and thunlp/OPD.
    assert (args.support_size, args.support_of, args.delta) == (16, "student", 3.0)
    assert (args.num_generations, args.max_completion_length, args.learning_rate) == (4, 7168, 1e-6)
    support = args.loss_divergence().support
    assert (support.k, support.of, support.remainder) == (16, "student", "whole")
    assert args.reward_weight == 0  # GRPO is optional
