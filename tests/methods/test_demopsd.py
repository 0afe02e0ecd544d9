# SPDX-License-Identifier: Apache-2.0
"""DemoPSD: a whole step by hand from raw logits, who reads whose rollout, and settings."""

import math
import random

import pytest
import torch
from groups import EXACT, TEXTS, bare, ids_of, logits_of, privileged
from pages import assert_same_gradients, moved, prepared, raw_logits, weights_after_steps

from trl_opsd.methods.demopsd import peer_contexts
from trl_opsd.teacher.contexts import Moment, Rollout
from trl_opsd.trainers.demopsd import DemoPSDConfig, DemoPSDTrainer

SMALL = {"max_completion_length": 40, "num_generations": 4, "per_device_train_batch_size": 8}
K, FLOOR, CAP = 5, 1e-3, 2.0


@pytest.fixture
def build(build_group):
    return build_group


def peer_texts(trainer, texts, step=0):
    """The peer that the teacher reads for each rollout of two groups, None without one."""
    draw, peers = random.Random(f"{trainer.args.seed}/{step}"), []
    for start in (0, 4):
        for index in range(start, start + 4):
            others = [texts[j] for j in range(start, start + 4) if j != index and "boxed" in texts[j]]
            peers.append(draw.choice(others) if others else None)
    return peers


def mixed(log_s, log_t, a_max, beta):
    """Log of the target, position by position."""
    s, t = log_s.exp(), log_t.exp()
    m = (s + t) / 2
    d = 0.5 * (s * (s / m).log() + t * (t / m).log()).sum(-1, keepdim=True)
    a = 2 * a_max * (torch.sigmoid(beta * d) - 0.5)
    return ((1 - a) * log_t + a * log_s).log_softmax(-1), a


def over_support(log_q, log_p):
    """Log-probabilities (K + 1) of one position over the student's likeliest tokens and the rest."""
    kept = log_q.detach().argsort(descending=True)[:K]
    rest = [1 - log.exp()[kept].sum() for log in (log_q, log_p)]
    joined = [torch.cat([log[kept], other.log().view(1)]) for log, other in zip((log_q, log_p), rest, strict=True)]
    return joined[0], joined[1].clamp(min=math.log(FLOOR))


def loss_by_hand(trainer, student, teacher, rows, batch, a_max, beta):
    """The mean over tokens, with gradient, and the shares a of all of them."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    old = dict(zip(batch["rollout_index"].tolist(), batch["old_per_token_logps"], strict=True))
    total, count, shares, weights = 0.0, 0, [], []
    for index, peer in enumerate(peer_texts(trainer, texts)):
        if peer is None:
            continue
        plain, completion = ids_of(trainer, rows[index]["prompt"], **args.chat_template_kwargs), completions[index]
        read = privileged(trainer, rows[index], args.teacher_prompt_template, peer)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        log_s = (logits_of(teacher, plain, completion) / heat).log_softmax(-1)
        log_t = (logits_of(teacher, read, completion) / heat).log_softmax(-1)
        target, a = mixed(log_s, log_t, a_max, beta)
        shares.append(a)
        for t, token in enumerate(completion):
            q, p = over_support(log_q[t], target[t])
            weight = min(math.exp(log_q[t, token].item() - old[index][t].item()), CAP)
            total = total + weight * (q.exp() * (q - p)).sum()
            count += 1
            weights.append(weight)
    return total / count, torch.cat(shares), weights


@pytest.mark.parametrize("a_max", [0.4, 0.0], ids=["mix", "teacher alone"])
@pytest.mark.parametrize("ratios", ["real", "on policy"])
def test_a_step_with_a_lagging_average_equals_the_formula_from_raw_logits(build, dataset, a_max, ratios):
    settings = {"support_size": K, "target_floor": FLOOR, "largest_plain_share": a_max, "disagreement_sensitivity": 3.0}
    trainer = build(DemoPSDTrainer, **SMALL, **settings, temperature=1.2)
    teacher = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 5) for _ in range(4)]
    batch = prepared(trainer, rows)
    shape = batch["completion_ids"].shape
    with torch.no_grad():
        now = trainer.policy_logps(trainer.model, batch)[0]
    shift = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if ratios == "real":
        batch["old_per_token_logps"] = now + 0.5 * shift
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    batch.setdefault("old_per_token_logps", now)
    hand, shares, weights = loss_by_hand(trainer, student, teacher, rows, batch, a_max, 3.0)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), **EXACT)
    assert_same_gradients(trainer.model, student)
    assert (0.01 < shares.mean() < 0.4) if a_max else not shares.any()
    assert (max(weights) == CAP and min(weights) < 0.8) == (ratios == "real")


def test_a_rollout_whose_group_has_no_other_right_one_is_left_out(build, dataset):
    trainer = build(DemoPSDTrainer, **SMALL)
    batch = prepared(trainer, [dataset[index] for index in (0, 5) for _ in range(4)])
    trained = dict(zip(batch["rollout_index"].tolist(), batch["distillation_mask"].any(1).tolist(), strict=True))
    assert [index for index in range(8) if not trained[index]] == [7]  # the only right one of the second group


def rollouts(rewards):
    return [Rollout("x", None, f"y{index}", reward) for index, reward in enumerate(rewards)]


def contexts_of(rewards, seed=0):
    return peer_contexts(rollouts(rewards), DemoPSDConfig(output_dir="out", use_cpu=True, bf16=False), moment(seed))


def moment(seed):
    return Moment(random.Random(seed))


def test_no_rollout_reads_itself_and_every_right_peer_is_read_at_times():
    read = [[views[0].slot for views in contexts_of([1, 1, 0, 1, None], seed)] for seed in range(40)]
    for index, texts in enumerate(zip(*read, strict=True)):
        assert set(texts) == {"y0", "y1", "y3"} - {f"y{index}"}


@pytest.mark.parametrize(("rewards", "used"), [([0, 0], []), ([1, 0], [1]), ([1, 1], [0, 1]), ([None, 1], [0])])
def test_a_rollout_needs_a_right_peer(rewards, used):
    assert [index for index, views in enumerate(contexts_of(rewards)) if views] == used


def test_the_direction_is_the_plain_view_less_the_teachers():
    teacher, plain = contexts_of([1, 0])[1]
    assert (teacher.template, teacher.anchor, teacher.direction, teacher.slot_tokens) == ("teacher", 1, -1, 10_240)
    assert (plain.template, plain.anchor, plain.direction) == ("plain", 0, 1)


def test_one_by_four_equals_two_by_two_accumulation(build):
    settings = {"max_completion_length": 40, "num_generations": 4, "max_steps": 2}
    weights, start = weights_after_steps(build, DemoPSDTrainer, **settings)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


def test_equal_views_leave_the_divergence_to_the_average_alone(build, dataset):
    """With the student's own prompt as the teacher's template and no lag, loss and gradient are 0."""
    settings = {"teacher_prompt_template": "{prompt}{solution}", "support_size": None, "target_floor": None}
    trainer = build(
        DemoPSDTrainer, texts=("",), reward=lambda completions, **_: [1.0] * len(completions), **SMALL, **settings
    )
    loss = trainer.compute_loss(trainer.model, prepared(trainer, [dataset[0]] * 8))
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert max(p.grad.abs().max().item() for p in trainer.model.parameters()) < 1e-12


@pytest.mark.parametrize(
    "bad",
    [
        {"largest_plain_share": 1.5},
        {"disagreement_sensitivity": 0.0},
        {"support_size": 0},
        {"target_floor": 1.0},
        {"importance_cap": 0.0},
        {"max_rollout_context_length": 0},
        {"num_generations": 1},
    ],
    ids=lambda value: next(iter(value)),
)
def test_bad_settings_are_refused_by_name(make_args, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_args(DemoPSDConfig, **{**SMALL, **bad})


def test_the_defaults_are_the_papers():
    divergence = DemoPSDConfig(output_dir="out", use_cpu=True, bf16=False).loss_divergence()
    assert (divergence.name, divergence.clip, divergence.target_floor) == ("reverse_kl", None, 1e-8)
    assert (divergence.support.k, divergence.support.of, divergence.support.remainder) == (100, "student", "tail")


assert sum("boxed" in text for text in TEXTS[4:]) == 1  # what the tests of left-out rollouts rely on
