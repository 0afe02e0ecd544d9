# SPDX-License-Identifier: Apache-2.0
"""AntiSD: a whole step by hand from raw logits, GRPO at lambda 0, the gate's memory, and who reads what."""

import copy
import json
import math
import random

import pytest
import torch
from groups import EXACT, bare, ids_of, logits_of
from pages import an_older_policy, assert_same_gradients, prepared, raw_logits, weights_after_steps
from trl import GRPOConfig, GRPOTrainer

from trl_opsd.methods import Seen
from trl_opsd.methods.antisd import ANTISD, entropy_gate_memory, verdict_contexts
from trl_opsd.teacher.contexts import Moment, Rollout
from trl_opsd.trainers.antisd import AntiSDConfig, AntiSDTrainer

SMALL = {
    "max_completion_length": 40,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
EPSILON = 0.2


@pytest.fixture
def build(build_group):
    return build_group


def advantages(rewards):
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (deviation + 1e-4) for r in rewards]


def verdict_ids(trainer, row, solution, right):
    args = trainer.args
    text = args.verdict_prompt_template.replace("{prompt}", row["prompt"][-1]["content"]).replace(
        "{solution}", solution
    )
    text = text.replace("{verdict}", "correct" if right else "incorrect")
    return ids_of(trainer, [{"role": "user", "content": text}], **args.teacher_chat_template_kwargs)


def solutions_read(trainer, rows, texts):
    """What the teacher reads for each rollout of two groups: a random right peer, else the row's solution."""
    draw, read = random.Random(f"{trainer.args.seed}/0"), []
    for index, row in enumerate(rows):
        start = index // 4 * 4
        peers = [texts[j] for j in range(start, start + 4) if j != index and "boxed" in texts[j]]
        read.append(draw.choice(peers) if peers else row["solution"])
    return read


def loss_by_hand(trainer, student, rows, strength, old):
    """GRPO's clipped loss over all tokens with the moved advantage; `old` is None or log-probabilities by rollout."""
    heat = trainer.args.temperature
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = ["boxed" in text for text in texts]
    base = [a for start in (0, 4) for a in advantages([float(r) for r in right[start : start + 4]])]
    total, moves = 0.0, []
    for index, solution in enumerate(solutions_read(trainer, rows, texts)):
        row, completion = rows[index], completions[index]
        read = verdict_ids(trainer, row, solution, right[index])
        log_t = (logits_of(student, read, completion) / heat).log_softmax(-1)
        plain = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        for t, token in enumerate(completion):
            before = log_q[t, token].item() if old is None else old[index][t].item()
            u = log_t[t, token].item() - before
            move = strength * 0.5 * (math.log1p(math.exp(u)) - math.log(2))
            moves.append(move)
            ratio = (log_q[t, token] - before).exp()
            advantage = base[index] - move
            total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    return total / len(moves), moves


@pytest.mark.parametrize("ratios", ["real", "on policy"])
def test_a_step_with_an_open_gate_equals_the_formula_from_raw_logits(build, dataset, ratios):
    trainer = build(AntiSDTrainer, **SMALL, temperature=1.2, gate_warmup_batches=0, ascent_strength=2.0)
    student, rows = bare(trainer), [dataset[index] for index in (0, 5) for _ in range(4)]
    batch, old = prepared(trainer, rows), None
    if ratios == "real":
        old = an_older_policy(trainer, batch)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, moves = loss_by_hand(trainer, student, rows, 2.0, old)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), rel=1e-6, abs=1e-7)  # advantages are float32 in TRL
    assert_same_gradients(trainer.model, student)
    assert min(moves) < -0.1 and max(moves) > 0.1
    assert trainer.memory == {"warmup": [], "gate": 1.0, "ascends": 1.0}


def test_in_the_first_batches_the_step_is_grpos(build, dataset):
    trainer = build(AntiSDTrainer, **SMALL, gate_warmup_batches=1)
    student, rows = bare(trainer), [dataset[index] for index in (0, 5) for _ in range(4)]
    loss = trainer.compute_loss(trainer.model, prepared(trainer, rows))
    hand, _ = loss_by_hand(trainer, student, rows, 0.0, None)
    assert loss.item() == pytest.approx(hand.item(), abs=1e-7)
    assert len(trainer.memory["warmup"]) == 1 and trainer.memory["ascends"] == 0


def test_the_gate_sees_the_median_of_the_entropies_of_the_views_alone(build, dataset):
    """Without solutions the only right rollout of a group has no view; it must not count as a sure teacher."""
    trainer = build(AntiSDTrainer, **SMALL, rows=dataset.map(lambda row: {"solution": None}))
    student, rows = bare(trainer), [dataset[index] | {"solution": None} for index in (0, 5) for _ in range(4)]
    batch = prepared(trainer, rows)
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    entropies = []
    for index, solution in enumerate(solutions_read(trainer, rows, texts)):
        if solution is not None:
            read = verdict_ids(trainer, rows[index], solution, "boxed" in texts[index])
            log_t = logits_of(student, read, completions[index]).log_softmax(-1)
            entropies += (-(log_t.exp() * log_t).sum(-1)).tolist()
    middle = sorted(entropies)[(len(entropies) - 1) // 2]
    assert trainer.memory["warmup"] == [pytest.approx(middle, **EXACT)]
    row = batch["rollout_index"].tolist().index(7)
    assert not batch["distillation_mask"][row].any() and batch["completion_mask"][row].any()


def test_a_rollout_without_a_view_keeps_its_own_advantage(build, dataset):
    trainer = build(AntiSDTrainer, **SMALL, rows=dataset.map(lambda row: {"solution": None}), gate_warmup_batches=0)
    rows = [dataset[index] | {"solution": None} for index in (0, 5) for _ in range(4)]
    batch, used = prepared(trainer, rows), []
    policy_loss = trainer.policy_loss
    trainer.policy_loss = lambda model, given, *rest: (
        used.append(given["advantages"]),
        policy_loss(model, given, *rest),
    )[1]
    trainer.compute_loss(trainer.model, batch)
    order = batch["rollout_index"].tolist()
    moved = [bool((used[0][row] - batch["advantages"][row] != 0).any()) for row in map(order.index, range(8))]
    assert moved == [True] * 7 + [False]


def reward_by_length(completions, **columns):
    return [float(len(completion[0]["content"]) % 3 == 0) for completion in completions]


def test_without_strength_three_steps_are_those_of_trls_grpo_trainer(make_model, make_args, dataset, tokenizer):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    histories = []
    for trainer_class, config_class, own in (
        (AntiSDTrainer, AntiSDConfig, {"ascent_strength": 0.0, "gate_warmup_batches": 0}),
        (GRPOTrainer, GRPOConfig, {}),
    ):
        trainer = trainer_class(
            model=make_model(torch.float64),
            reward_funcs=reward_by_length,
            args=make_args(config_class, **settings, **own),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
    ours, theirs = histories
    assert len(ours) == len(theirs) == 3
    for own, other in zip(ours, theirs, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-7)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
        assert own["reward"] == other["reward"]
    assert sum(own["grad_norm"] for own in ours) > 0.1


def seen(*medians):
    """A batch with one rollout a median, whose entropies lie around it."""
    entropies = [torch.tensor([[m - 0.01, m, m + 0.01]], dtype=torch.float64) for m in medians]
    return Seen([], entropies, entropies)


def test_the_gate_follows_a_trace_by_hand_and_survives_save_and_load(make_args):
    settings = make_args(AntiSDConfig, **SMALL)
    warmup = [(1.1, 0.0), (0.9, 0.0), (1.0, 0.0), (1.05, 0.0), (0.95, 0.0)]  # their mean is 1
    # Between the two thresholds the gate stays what it was: open at first, shut after 0.92, open again after 1.
    trace = [(0.95, 1.0), (0.94, 1.0), (0.92, 0.0), (0.94, 0.0), (0.999, 0.0), (1.0, 1.0), (0.93, 1.0), (0.5, 0.0)]
    memory = {}
    for entropy, ascends in warmup + trace:
        memory = json.loads(json.dumps(entropy_gate_memory(memory, seen(entropy), settings)))
        assert memory["ascends"] == ascends, entropy
    assert memory["warmup"] == pytest.approx([h for h, _ in warmup], abs=1e-12)


def test_a_batch_without_a_view_leaves_the_gate_as_it_is(make_args):
    settings, memory = make_args(AntiSDConfig, **SMALL), {"warmup": [1.0], "gate": 1.0, "ascends": 0.0}
    assert entropy_gate_memory(memory, Seen([], [], []), settings) == memory
    nothing = torch.zeros(0, 5, dtype=torch.float64)
    assert entropy_gate_memory(memory, Seen([], [nothing], [nothing]), settings) == memory


def rollouts(rewards, solution="s"):
    return [Rollout("x", solution, f"y{index}", reward) for index, reward in enumerate(rewards)]


@pytest.fixture
def read(make_args):
    """(solution, verdict) of each rollout's view, None without one."""

    def read(group, seed=0):
        contexts = verdict_contexts(group, make_args(AntiSDConfig, **SMALL), Moment(random.Random(seed)))
        return [(views[0].slot, dict(views[0].texts)["verdict"]) if views else None for views in contexts]

    return read


@pytest.mark.parametrize(
    ("rewards", "solution", "wanted"),
    [
        ([0, 0], "s", [("s", "incorrect"), ("s", "incorrect")]),
        ([0, 0], None, [None, None]),
        ([1, 0], "s", [("s", "correct"), ("y0", "incorrect")]),
        ([1, 0], None, [None, ("y0", "incorrect")]),
        ([1, 1], None, [("y1", "correct"), ("y0", "correct")]),
        ([None, 1], "s", [None, ("s", "correct")]),
        ([1, 0], " ", [None, ("y0", "incorrect")]),
    ],
)
def test_the_teacher_reads_a_verified_solution_and_the_verdict_on_the_rollout_itself(read, rewards, solution, wanted):
    assert read(rollouts(rewards, solution)) == wanted


def test_no_rollout_reads_itself_and_every_right_peer_is_read_at_times(read):
    texts = [[view[0] for view in read(rollouts([1, 1, 0, 1]), seed)] for seed in range(40)]
    for index, own in enumerate(zip(*texts, strict=True)):
        assert set(own) == {"y0", "y1", "y3"} - {f"y{index}"}


def test_one_by_four_equals_two_by_two_accumulation(build):
    settings = {"max_completion_length": 40, "num_generations": 4, "max_steps": 2, "gate_warmup_batches": 0}
    weights, start = weights_after_steps(build, AntiSDTrainer, **settings, ascent_strength=2.0)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-7)  # advantages are float32


@pytest.mark.parametrize(
    "bad",
    [
        {"ascent_strength": -1.0},
        {"gate_warmup_batches": -1},
        {"gate_closes_below": -0.5},
        {"gate_opens_at": 0.5},
        {"max_rollout_context_length": 0},
        {"num_generations": 1},
    ],
    ids=lambda value: next(iter(value)),
)
def test_bad_settings_are_refused_by_name(make_args, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_args(AntiSDConfig, **{**SMALL, **bad})


def test_a_template_without_a_verdict_is_refused(make_args):
    with pytest.raises(ValueError, match=r"verdict_prompt_template does not contain \{verdict\}"):
        make_args(AntiSDConfig, **SMALL, verdict_prompt_template="{prompt} {solution}")


def test_the_default_strength_and_gate_are_the_papers():
    args = AntiSDConfig(output_dir="out", use_cpu=True, bf16=False)
    assert (args.ascent_strength, args.gate_warmup_batches, args.gate_closes_below, args.epsilon) == (0.5, 5, 0.93, 0.2)
    assert (args.reward_weight, args.teacher_model_kind, args.beta) == (1.0, "live", 0.0)
    assert not ANTISD.has_target
