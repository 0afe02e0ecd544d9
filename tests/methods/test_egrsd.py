# SPDX-License-Identifier: Apache-2.0
"""EGRSD and CL-EGRSD: a whole step by hand from raw logits, the running scale of rewards, and settings."""

import json
import statistics

import pytest
import torch
from groups import EXACT, bare, ids_of, logits_of, privileged, reward_boxed
from pages import assert_same_gradients, moved, prepared, raw_logits, weights_after_steps

from trl_opsd.experimental.egrsd.method import remember_scale, solution_read
from trl_opsd.experimental.egrsd.trainer import EGRSDConfig, EGRSDTrainer
from trl_opsd.methods import Seen
from trl_opsd.teacher.contexts import Rollout

LONGEST = 40
SMALL = {"max_completion_length": LONGEST, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
BONUS = 0.5


@pytest.fixture
def build(build_group):
    return build_group


def reward_by_hand(text, length):
    return float("boxed" in text) * (1 + BONUS * (1 - length / LONGEST))


def clip(value, low, high):
    return max(low, min(high, value))


def loss_by_hand(trainer, student, teacher, rows, strength, bound, window, earlier):
    """The mean over tokens, with gradient, and the gates; `earlier` are rewards of batches before."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = [reward_by_hand(text, len(ids)) for text, ids in zip(texts, completions, strict=True)]
    seen = [*earlier, *rewards]
    mean, deviation = statistics.fmean(seen), statistics.pstdev(seen)
    completions, targets = [ids[: args.distillation_length] for ids in completions], []
    for row, completion in zip(rows, completions, strict=True):
        read = privileged(trainer, row, args.teacher_prompt_template, row["solution"])
        targets.append((logits_of(teacher, read, completion) / heat).log_softmax(-1))
    entropies = [(-(log.exp() * log).sum(-1)).tolist() for log in targets]
    largest = max(1.0, *(h for own in entropies for h in own))
    total, gates = 0.0, []
    for row, completion, reward, log_t, own in zip(rows, completions, rewards, targets, entropies, strict=True):
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        advantage = (reward - mean) / deviation
        for t, token in enumerate(completion):
            ratio = (log_t[t, token] - log_q[t, token].detach()).exp().item()
            weight = clip(ratio if advantage > 0 else 1 / ratio, 1 - bound, 1 + bound)
            gate = clip(1 - strength * min(own[t : t + window + 1]) / largest, 0.1, 1)
            gates.append(gate)
            total = total - advantage * weight * gate * log_q[t, token]
    return total / len(gates), gates


@pytest.mark.parametrize(
    ("strength", "bound", "window"),
    [(0.5, 0.4, 0), (0.5, 0.4, 5), (1.1, 0.4, 0), (0.0, 0.4, 0), (0.0, 0.0, 0)],
    ids=["EGRSD", "CL-EGRSD", "at the floor", "no gate: RLSD at l = 1", "no gate, e = 0: REINFORCE"],
)
def test_a_step_equals_the_formula_from_raw_logits(build, dataset, strength, bound, window):
    settings = {"entropy_gate_strength": strength, "evidence_bound": bound, "lookahead_tokens": window}
    trainer = build(EGRSDTrainer, **SMALL, **settings, brevity_bonus=BONUS)
    teacher = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    trainer.memory = {"rewards": [3, 0.5, 0.5], "largest_entropy": 99.0}  # 0, 0.5, 1
    loss = trainer.compute_loss(trainer.model, prepared(trainer, rows))
    loss.backward()
    hand, gates = loss_by_hand(trainer, student, teacher, rows, strength, bound, window, [0.0, 0.5, 1.0])
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), **EXACT)
    assert_same_gradients(trainer.model, student)
    assert max(gates) - min(gates) > 0.02 if strength else set(gates) == {1.0}
    assert (min(gates) == 0.1) == (strength == 1.1)


def test_looking_ahead_never_gates_harder(build, dataset):
    gates = []
    for window in (0, 5):
        trainer = build(EGRSDTrainer, **SMALL, entropy_gate_strength=0.5, lookahead_tokens=window)
        rows, model = [dataset[index] for index in (0, 3, 5, 7)], bare(trainer)
        prepared(trainer, rows)
        gates.append(loss_by_hand(trainer, model, model, rows, 0.5, 0.2, window, [])[1])
    assert all(after >= before for before, after in zip(*gates, strict=True)) and gates[0] != gates[1]


def batch_of(rewards, lengths, entropies):
    rollouts = [Rollout("x", "s", "y", reward, length) for reward, length in zip(rewards, lengths, strict=True)]
    views = [torch.tensor([own], dtype=torch.float64) for own in entropies]
    return Seen(rollouts, views, views)


def test_the_scale_of_rewards_runs_on_and_the_largest_entropy_is_the_batchs(make_args):
    settings, memory, seen = make_args(EGRSDConfig, **SMALL, brevity_bonus=BONUS), {}, []
    batches = [
        batch_of([1.0, 0.0], [10, 40], [[0.5, 3.0], [2.0]]),
        batch_of([1.0, None, 1.0], [40, 5, 20], [[0.7], [], [0.1, 0.2]]),
        batch_of([None], [3], [[]]),
    ]
    for batch, largest in zip(batches, (3.0, 0.7, 0.0), strict=True):
        memory = json.loads(json.dumps(remember_scale(memory, batch, settings)))
        seen += [
            rollout.reward * (1 + BONUS * (1 - rollout.num_tokens / LONGEST))
            for rollout in batch.rollouts
            if rollout.reward is not None
        ]
        count, mean, squares = memory["rewards"]
        assert count == len(seen) and mean == pytest.approx(statistics.fmean(seen), abs=1e-12)
        assert (squares / count) ** 0.5 == pytest.approx(statistics.pstdev(seen), abs=1e-12)
        assert memory["largest_entropy"] == largest


def test_equal_rewards_give_no_gradient_and_no_nan(build, dataset):
    trainer = build(EGRSDTrainer, **SMALL, texts=("1+2=3", "no"))
    loss = trainer.compute_loss(trainer.model, prepared(trainer, [dataset[index] for index in range(4)]))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_a_rollout_without_a_reward_is_left_out(build, dataset):
    def some(completions, **columns):
        return [None, *reward_boxed(completions)[1:]]

    trainer = build(EGRSDTrainer, **SMALL, reward=some)
    batch = prepared(trainer, [dataset[index] for index in (0, 3, 5, 7)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    first = batch["rollout_index"].tolist().index(0)
    assert not batch["distillation_mask"][first].any() and batch["completion_mask"][first].any()
    assert trainer.memory["rewards"][0] == 3
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters())


def test_the_teacher_reads_the_solution_of_every_rollout_that_has_a_reward():
    group = [Rollout("x", "s", "y", 1.0), Rollout("x", "s", "y", None)]
    contexts = solution_read(group, None, None)
    assert [(view.template, view.slot, view.read) for view in contexts[0]] == [("teacher", "s", 1.0)]
    assert contexts[1] == ()


def test_a_cut_at_the_distilled_length_leaves_the_reward_of_the_whole_rollout(build, dataset):
    trainer = build(EGRSDTrainer, **SMALL, distillation_length=3, brevity_bonus=BONUS)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    loss = trainer.compute_loss(trainer.model, prepared(trainer, rows))
    hand, gates = loss_by_hand(trainer, student, student, rows, 0.1, 0.2, 0, [])
    assert loss.item() == pytest.approx(hand.item(), **EXACT)
    assert len(gates) == 4 * 3


def test_one_by_four_equals_two_by_two_accumulation(build):
    splits = ((8, 1), (4, 2), (2, 4))
    settings = {"max_completion_length": LONGEST, "max_steps": 2, "entropy_gate_strength": 0.5}
    weights, start = weights_after_steps(build, EGRSDTrainer, splits, **settings)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        {"evidence_bound": 1.5},
        {"entropy_gate_strength": -0.1},
        {"entropy_gate_floor": 2.0},
        {"lookahead_tokens": -1},
        {"brevity_bonus": -1.0},
        {"max_completion_length": None},
    ],
    ids=lambda value: next(iter(value)),
)
def test_bad_settings_are_refused_by_name(make_args, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_args(EGRSDConfig, **{**SMALL, **bad})
