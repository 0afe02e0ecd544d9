# SPDX-License-Identifier: Apache-2.0
"""DASD: a whole step by hand from raw logits, GRPO as a special case, which tokens are pulled, and settings."""

import math
import random

import pytest
import torch
from groups import bare, ids_of, logits_of, privileged
from grpo import assert_steps_of_grpo, clipped_terms, group_advantages
from loss_problem import draw
from pages import an_older_policy, assert_same_gradients, moved, prepared, raw_logits, weights_after_steps

from trl_opsd.experimental.dasd.method import DASD, directed_advantage, verified_solutions
from trl_opsd.experimental.dasd.trainer import DASDConfig, DASDTrainer
from trl_opsd.methods import RowFacts
from trl_opsd.teacher.contexts import Moment, Rollout

pytestmark = pytest.mark.filterwarnings("ignore:DASD is experimental")
SMALL = {
    "max_completion_length": 40,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
MOMENT = Moment(random.Random(0))


@pytest.fixture
def build(build_group):
    return build_group


def slots(trainer, rows, texts):
    draw, read = random.Random(f"{trainer.args.seed}/0"), []
    for index, row in enumerate(rows):
        start = index // 4 * 4
        peers = [texts[j] for j in range(start, start + 4) if j != index and "boxed" in texts[j]]
        read.append(draw.choice(peers) if peers else row["solution"])
    return read


def moves(entropies, ratios, rho):
    """omega d of a rollout's tokens, in numbers of Python."""
    size = sum(map(abs, ratios)) / len(ratios)
    place = rho * (len(entropies) - 1)
    low, ranked = math.floor(place), sorted(entropies)
    tau = ranked[low] + (place - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])
    mean = sum(entropies) / len(entropies)
    sigma = sum(abs(h - mean) for h in entropies) / len(entropies)
    found = []
    for h, u in zip(entropies, ratios, strict=True):
        d = u / size
        found.append(math.tanh((tau - h) / sigma) / (1 + math.exp(1 - abs(d))) * d)
    return found


def loss_by_hand(trainer, student, teacher, rows, old):
    """GRPO's clipped loss with the moved advantage over all tokens, with gradient, and the moves."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    base = [a for start in (0, 4) for a in group_advantages([float("boxed" in t) for t in texts[start : start + 4]])]
    total, count, seen = 0.0, 0, []
    for index, slot in enumerate(slots(trainer, rows, texts)):
        row, completion = rows[index], completions[index]
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        context = privileged(trainer, row, args.teacher_prompt_template, slot)
        log_p = (logits_of(teacher, context, completion) / heat).log_softmax(-1)
        entropies = (-(log_q.detach().exp() * log_q.detach()).sum(-1)).tolist()
        own = [log_q[t, token].item() if old is None else old[index][t].item() for t, token in enumerate(completion)]
        ratios = [log_p[t, token].item() - own[t] for t, token in enumerate(completion)]
        for t, move in enumerate(moves(entropies, ratios, args.pulled_share)):
            advantage = base[index] + args.direction_strength * move
            total = total + clipped_terms(log_q[t, completion[t]], own[t], advantage, args.epsilon, args.epsilon)
            count += 1
            seen.append(move)
    return total / count, seen


@pytest.mark.parametrize("ratios", ["real", "on policy"])
def test_a_step_equals_the_formula_from_raw_logits(build, dataset, ratios):
    texts = (
        "1+2=3",
        "so \\boxed{3}",
        "wait, 10 it is",
        "it is \\boxed{10} then",
        "abc",
        "no it",
        "5 or 6",
        "\\boxed{6}",
    )
    trainer = build(DASDTrainer, texts, **SMALL, temperature=1.2, direction_strength=1.5, pulled_share=0.3)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 5) for _ in range(4)]
    batch, old = prepared(trainer, rows), None
    if ratios == "real":
        old = an_older_policy(trainer, batch)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, seen = loss_by_hand(trainer, student, student, rows, old)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), rel=1e-6, abs=1e-6)  # advantages are float32 in TRL
    assert_same_gradients(trainer.model, student, rtol=3e-5)
    assert min(seen) < -0.2 and max(seen) > 0.2


def test_without_strength_three_steps_are_those_of_trls_grpo_trainer(make_model, make_args, dataset, tokenizer):
    settings = {"direction_strength": 0.0, **SAMPLING}
    assert_steps_of_grpo(DASDTrainer, make_model, make_args, dataset, tokenizer, **settings)


MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


def advantages(make_args, entropy, ratio, mask=MASK, **settings):
    """What the page makes of entropies and log-ratios (B, D), with an advantage of 0.7."""
    old = torch.full_like(entropy, -2.0)
    given = {
        "view_log_probs": (old + ratio)[None],
        "old_log_prob": old,
        "mask": mask,
        "advantage": torch.full_like(entropy, 0.7),
    }
    facts = RowFacts(old, None, entropy, None, None, None, given)
    return directed_advantage(facts, make_args(DASDConfig, **SMALL, **settings), MOMENT)


@pytest.mark.parametrize("why", ["no difference", "constant entropy", "no strength"])
def test_where_nothing_tells_tokens_apart_it_is_grpo(make_args, why):
    entropy, ratio = draw(2, 6).abs(), draw(2, 6, seed=1)
    entropy = torch.full_like(entropy, 0.3) if why == "constant entropy" else entropy
    ratio = torch.zeros_like(ratio) if why == "no difference" else ratio
    settings = {"direction_strength": 0.0} if why == "no strength" else {}
    got = advantages(make_args, entropy, ratio, **settings)
    torch.testing.assert_close(got, torch.full_like(got, 0.7), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("share", "sign"), [(1.0, 1), (0.0, -1)])
def test_a_share_of_1_pulls_every_token_and_one_of_0_pushes_every_token(make_args, share, sign):
    ratio = draw(2, 6, seed=1)
    moved_by = advantages(make_args, draw(2, 6).abs(), ratio, pulled_share=share) - 0.7
    assert (sign * moved_by * ratio >= 0).all() and (moved_by != 0).sum() == MASK.sum() - 2  # the quantile's own stays


def test_the_unit_of_the_entropy_changes_nothing_and_neither_does_what_is_masked(make_args):
    entropy, ratio = draw(2, 6).abs(), draw(2, 6, seed=1)
    want = advantages(make_args, entropy, ratio)
    torch.testing.assert_close(advantages(make_args, 7 * entropy, ratio), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(advantages(make_args, entropy, 5 * ratio), want, rtol=0, atol=1e-14)
    hostile = advantages(make_args, entropy.masked_fill(MASK == 0, 1e6), ratio.masked_fill(MASK == 0, -1e6))
    torch.testing.assert_close(hostile[MASK != 0], want[MASK != 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rewards", "solution", "wanted"),
    [
        ([0, 0], "s", ["s", "s"]),
        ([0, 0], None, ["no solution", "no solution"]),
        ([1, 0], "s", ["s", "y0"]),
        ([1, 0], " ", ["no solution", "y0"]),
        ([1, None], None, ["no solution", "y0"]),
    ],
)
def test_the_teacher_reads_a_right_peer_and_else_the_solution(make_args, rewards, solution, wanted):
    group = [Rollout("x", solution, f"y{index}", reward) for index, reward in enumerate(rewards)]
    contexts = verified_solutions(group, make_args(DASDConfig, **SMALL), MOMENT)
    assert [views[0].slot if views else views.reason for views in contexts] == wanted


def test_no_rollout_reads_itself_and_every_right_peer_is_read_at_times(make_args):
    group = [Rollout("x", None, f"y{index}", reward) for index, reward in enumerate([1, 1, 0, 1])]
    settings = make_args(DASDConfig, **SMALL)
    drawn = [verified_solutions(group, settings, Moment(random.Random(seed))) for seed in range(40)]
    for index, own in enumerate(zip(*drawn, strict=True)):
        assert {views[0].slot for views in own} == {"y0", "y1", "y3"} - {f"y{index}"}


def test_one_by_four_equals_two_by_two_accumulation(build):
    settings = {"max_completion_length": 40, "num_generations": 4, "max_steps": 2, "direction_strength": 1.0}
    weights, start = weights_after_steps(build, DASDTrainer, **settings)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-6)  # advantages are float32


@pytest.mark.parametrize(
    "bad",
    [
        {"direction_strength": -0.1},
        {"pulled_share": 1.5},
        {"pulled_share": -0.1},
        {"max_rollout_context_length": 0},
        {"num_generations": 1},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(make_args, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_args(DASDConfig, **{**SMALL, **bad})


def test_the_defaults_are_the_notes_and_what_is_inferred_is_said():
    args = DASDConfig(output_dir="out", use_cpu=True, bf16=False)
    # arXiv 2605.22263, two notes: rho 0.2. Inferred: beta 0.1 and the live teacher.
    assert (args.pulled_share, args.direction_strength, args.teacher_model_kind) == (0.2, 0.1, "live")
    assert (args.beta, args.epsilon, args.reward_weight) == (0.0, 0.2, 1.0)
    assert "beta 0.1" in DASD.inferred and "live teacher" in DASD.inferred
