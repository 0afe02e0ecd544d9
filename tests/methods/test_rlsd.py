# SPDX-License-Identifier: Apache-2.0
"""RLSD and RLRT: whole steps by hand from raw logits, GRPO as a special case, one as the other's mirror, and settings."""

import math
import random
from dataclasses import replace

import pytest
import torch
from groups import bare, ids_of, logits_of, privileged
from grpo import assert_steps_of_grpo, clipped_terms, group_advantages
from loss_problem import draw
from pages import an_older_policy, assert_same_gradients, moved, prepared, raw_logits, weights_after_steps

from trl_opsd.methods import RowFacts
from trl_opsd.methods.rlrt import peers_of_right_rollouts, surprising_advantage
from trl_opsd.methods.rlsd import confirmed_advantage, solution_while_it_counts, strength_at
from trl_opsd.teacher.contexts import Moment, Rollout
from trl_opsd.trainers.rlrt import RLRTConfig, RLRTTrainer
from trl_opsd.trainers.rlsd import RLSDConfig, RLSDTrainer

SMALL = {
    "max_completion_length": 40,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}


@pytest.fixture
def build(build_group):
    return build_group


def solutions(trainer, rows, texts):
    return [row["solution"] for row in rows]


def right_peers(trainer, rows, texts):
    """A random other right rollout for each right one of two groups, None for the rest."""
    draw, read = random.Random(f"{trainer.args.seed}/0"), [None] * len(rows)
    for index, text in enumerate(texts):
        start = index // 4 * 4
        peers = [texts[j] for j in range(start, start + 4) if j != index and "boxed" in texts[j]]
        if "boxed" in text and peers:
            read[index] = draw.choice(peers)
    return read


def loss_by_hand(trainer, student, teacher, rows, read, direction, strength, old):
    """GRPO's clipped loss with the weighed advantage over all tokens, with gradient, and the weights of read tokens."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    base = [a for start in (0, 4) for a in group_advantages([float("boxed" in t) for t in texts[start : start + 4]])]
    total, count, weights = 0.0, 0, []
    for index, slot in enumerate(read(trainer, rows, texts)):
        row, completion = rows[index], completions[index]
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        if slot is not None:
            context = privileged(trainer, row, args.teacher_prompt_template, slot)
            log_p = (logits_of(teacher, context, completion) / heat).log_softmax(-1)
        for t, token in enumerate(completion):
            before = log_q[t, token].item() if old is None else old[index][t].item()
            weight = 1.0
            if slot is not None:
                evidence = math.exp(math.copysign(1, base[index]) * direction * (log_p[t, token].item() - before))
                bound = args.evidence_bound
                weight = 1 - strength + strength * min(max(evidence, 1 - bound), 1 + bound)
                weights.append(weight)
            high = args.epsilon if args.epsilon_high is None else args.epsilon_high
            total = total + clipped_terms(log_q[t, token], before, weight * base[index], args.epsilon, high)
            count += 1
    return total / count, weights


@pytest.mark.parametrize(
    ("trainer_class", "read", "direction"),
    [(RLSDTrainer, solutions, 1), (RLRTTrainer, right_peers, -1)],
    ids=["RLSD", "RLRT"],
)
@pytest.mark.parametrize("ratios", ["real", "on policy"])
def test_a_step_equals_the_formula_from_raw_logits(build, dataset, trainer_class, read, direction, ratios):
    settings = {"temperature": 1.2, "evidence_bound": 0.6, "evidence_strength": 0.8}
    trainer = build(trainer_class, **SMALL, **settings)
    first = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 5) for _ in range(4)]
    teacher = first if trainer_class is RLSDTrainer else student  # frozen, or live
    batch, old = prepared(trainer, rows), None
    if ratios == "real":
        old = an_older_policy(trainer, batch)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, weights = loss_by_hand(trainer, student, teacher, rows, read, direction, 0.8, old)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), rel=1e-6, abs=1e-7)  # advantages are float32 in TRL
    assert_same_gradients(trainer.model, student)
    assert min(weights) < 0.8 and max(weights) > 1.2


NO_WEIGHT = {"l = 0": {"evidence_strength": 0.0}, "e = 0": {"evidence_bound": 0.0}}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


@pytest.mark.parametrize("trainer_class", [RLSDTrainer, RLRTTrainer])
@pytest.mark.parametrize("none", NO_WEIGHT.values(), ids=NO_WEIGHT.keys())
def test_without_weight_three_steps_are_those_of_trls_grpo_trainer(
    make_model, make_args, dataset, tokenizer, trainer_class, none
):
    assert_steps_of_grpo(trainer_class, make_model, make_args, dataset, tokenizer, **none, **SAMPLING)


def test_a_teacher_without_an_opinion_leaves_three_steps_of_trls_grpo_trainer(
    make_model, make_args, dataset, tokenizer
):
    """u = 0: a live teacher that is shown the student's own prompt."""
    settings = {"teacher_prompt_template": "{prompt}{solution}", "teacher_model_kind": "live"}
    blank = dataset.map(lambda row: {"solution": "\\boxed{}"})

    class Plain(RLSDTrainer):
        method = replace(
            RLSDTrainer.method,
            contexts=lambda *args: [
                tuple(replace(view, template="plain", slot=None) for view in views)
                for views in RLSDTrainer.method.contexts(*args)
            ],
        )

    assert_steps_of_grpo(Plain, make_model, make_args, blank, tokenizer, **settings, **SAMPLING)


def facts_of(view, old, advantage):
    """Facts (B, D) of which the advantage rules read these columns alone."""
    given = {"view_log_probs": view[None], "old_log_prob": old, "advantage": advantage}
    return RowFacts(old, None, None, None, None, None, given)


@pytest.fixture
def columns():
    old, view = draw(6, 9, seed=1) - 2, draw(6, 9, seed=2) - 2
    return old, view, torch.tensor([1.3, -0.7, 0.0, 2.0, -1.0, 0.2]).double()[:, None].expand(6, 9)


MOMENT = Moment(random.Random(0), 15)


def test_rlrt_without_its_gate_is_rlsd_with_student_and_teacher_exchanged(make_args, columns):
    old, view, advantage = columns
    settings = {"evidence_bound": 0.7, "evidence_strength": 0.6, "evidence_steps": 60}
    reverse = surprising_advantage(facts_of(old, view, advantage), make_args(RLRTConfig, **SMALL, **settings), MOMENT)
    forward = confirmed_advantage(facts_of(view, old, advantage), make_args(RLSDConfig, **SMALL, **settings), MOMENT)
    torch.testing.assert_close(reverse, forward, rtol=0, atol=1e-15)
    assert (forward != advantage).any()


@pytest.mark.parametrize("rule", [(RLSDConfig, confirmed_advantage), (RLRTConfig, surprising_advantage)])
@pytest.mark.parametrize("bound", [0.2, 1.0])
def test_up_to_a_bound_of_1_no_sign_is_turned(make_args, columns, rule, bound):
    config, advantages = rule
    old, view, advantage = columns
    args = make_args(config, **SMALL, evidence_bound=bound, evidence_strength=1.0, evidence_steps=None)
    got = advantages(facts_of(view, old, advantage), args, MOMENT)
    assert (got * advantage >= 0).all() and ((got != 0) | (advantage == 0) | (bound == 1.0)).all()
    assert (got.abs() <= (1 + bound) * advantage.abs() + 1e-15).all()


def test_a_right_token_weighs_more_where_rlsds_teacher_finds_it_likelier_and_where_rlrts_does_not(make_args):
    old, view = torch.full((2, 2), -2.0).double(), torch.tensor([[-1.5, -2.5], [-1.5, -2.5]]).double()
    advantage = torch.tensor([[1.0], [-1.0]]).double().expand(2, 2)
    weight = {
        name: rule(facts_of(view, old, advantage), make_args(config, **SMALL, evidence_bound=0.5), Moment(None))
        / advantage
        for name, (config, rule) in {
            "rlsd": (RLSDConfig, confirmed_advantage),
            "rlrt": (RLRTConfig, surprising_advantage),
        }.items()
    }
    assert ((weight["rlsd"] > 1) == torch.tensor([[True, False], [False, True]])).all()
    assert ((weight["rlrt"] > 1) == torch.tensor([[False, True], [True, False]])).all()


def test_rlsds_strength_falls_to_0_and_then_no_teacher_is_asked(build, dataset, make_args):
    args = make_args(RLSDConfig, **SMALL)
    assert [strength_at(args, step) for step in (0, 30, 60, 90)] == [0.5, 0.25, 0.0, 0.0]
    group = [Rollout("x", "s", "y", 1.0)] * 2
    assert [len(views) for views in solution_while_it_counts(group, args, Moment(None, 59))] == [1, 1]
    assert solution_while_it_counts(group, args, Moment(None, 60)) == [(), ()]
    trainer = build(RLSDTrainer, **SMALL)
    trainer.state.global_step = 60
    student, rows = bare(trainer), [dataset[index] for index in (0, 5) for _ in range(4)]
    batch = prepared(trainer, rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, _ = loss_by_hand(trainer, student, student, rows, lambda *args: [None] * 8, 1, 0.0, None)
    hand.backward()
    assert not batch["distillation_mask"].any() and not any(map(len, trainer._batch.contexts))
    assert loss.item() == pytest.approx(hand.item(), abs=1e-7)
    assert_same_gradients(trainer.model, student)


def test_a_run_goes_on_when_no_teacher_is_asked_any_more(build):
    trainer = build(RLSDTrainer, **SMALL, evidence_steps=1, max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["groups/mixed"] for entry in logs] == [1.0] * 3
    assert all(math.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in logs)
    assert logs[0]["divergence"] != 0 and all(math.isfinite(entry.get("divergence", 0.0)) for entry in logs)
    assert not any("rows/used" in entry for entry in logs)  # GRPO is no failure that ten batches would warn of


@pytest.fixture
def read(make_args):
    """What RLRT's teacher reads of each rollout: a text, or why there is none."""

    def read(rewards, seed=0):
        group = [Rollout("x", None, f"y{index}", reward) for index, reward in enumerate(rewards)]
        contexts = peers_of_right_rollouts(group, make_args(RLRTConfig, **SMALL), Moment(random.Random(seed)))
        return [views[0].slot if views else views.reason for views in contexts]

    return read


def test_the_teacher_of_rlrt_reads_a_right_peer_of_right_rollouts_alone(read):
    assert read([1, 0, None]) == ["no right peer", "not right", "not right"]
    assert read([1, 1, 0]) == ["y1", "y0", "not right"]
    texts = [read([1, 1, 0, 1], seed) for seed in range(40)]
    for index, own in enumerate(zip(*texts, strict=True)):
        assert set(own) == ({"not right"} if index == 2 else {"y0", "y1", "y3"} - {f"y{index}"})


def test_rlrt_leaves_wrong_and_lonely_rollouts_their_advantage_and_counts_them(build, dataset):
    trainer = build(RLRTTrainer, **SMALL, evidence_bound=0.9)
    batch, used = prepared(trainer, [dataset[index] for index in (0, 5) for _ in range(4)]), []
    policy_loss = trainer.policy_loss
    trainer.policy_loss = lambda model, given, *rest: (
        used.append(given["advantages"]),
        policy_loss(model, given, *rest),
    )[1]
    trainer.compute_loss(trainer.model, batch)
    order = batch["rollout_index"].tolist()
    changed = (used[0] - batch["advantages"][:, None]).abs().amax(1) > 1e-6
    assert [bool(changed[order.index(index)]) for index in range(8)] == [False, True, False, True] + [False] * 4
    metrics = trainer._metrics["train"]
    assert metrics["rows/not_right"] == [5 / 8] and metrics["rows/no_right_peer"] == [1 / 8]
    assert metrics["rows/used"] == [2 / 8] and metrics["groups/mixed"] == [1.0]


@pytest.mark.parametrize("trainer_class", [RLSDTrainer, RLRTTrainer])
def test_one_by_four_equals_two_by_two_accumulation(build, trainer_class):
    settings = {"max_completion_length": 40, "num_generations": 4, "max_steps": 2, "evidence_bound": 0.9}
    weights, start = weights_after_steps(build, trainer_class, **settings)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-7)  # advantages are float32


@pytest.mark.parametrize("config", [RLSDConfig, RLRTConfig])
@pytest.mark.parametrize(
    "bad",
    [
        {"evidence_strength": -0.1},
        {"evidence_strength": 1.5},
        {"evidence_bound": -0.5},
        {"evidence_steps": 0},
        {"reward_weight": 0.0},
        {"num_generations": 1},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(make_args, config, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_args(config, **{**SMALL, **bad})


def test_a_budget_of_no_token_is_refused(make_args):
    with pytest.raises(ValueError, match="max_rollout_context_length=0"):
        make_args(RLRTConfig, **SMALL, max_rollout_context_length=0)


def test_the_defaults_are_the_papers_where_they_are_known():
    rlsd, rlrt = (config(output_dir="out", use_cpu=True, bf16=False) for config in (RLSDConfig, RLRTConfig))
    # iie-ycx/RLSD: l 0.5, e 0.2, no teacher from step 60 on; the initial weights, frozen.
    assert (rlsd.evidence_strength, rlsd.evidence_bound, rlsd.evidence_steps) == (0.5, 0.2, 60)
    assert rlsd.teacher_model_kind == "base" and rlsd.reward_weight == 1
    # arXiv 2605.10781: e 0.5 for instruct models, 0.2 and 0.28, no KL, 8 rollouts of 20,480 tokens, batch 256.
    assert (rlrt.evidence_bound, rlrt.epsilon, rlrt.epsilon_high, rlrt.beta) == (0.5, 0.2, 0.28, 0.0)
    assert (rlrt.num_generations, rlrt.max_completion_length) == (8, 20_480)
    assert rlrt.per_device_train_batch_size * rlrt.gradient_accumulation_steps == 256
    # Ours: l 0.5, held constant; the live teacher.
    assert (rlrt.evidence_strength, rlrt.evidence_steps, rlrt.teacher_model_kind) == (0.5, None, "live")
