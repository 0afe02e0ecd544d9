# SPDX-License-Identifier: Apache-2.0
"""vOPD: a whole step by hand from raw logits, the expectation of its gradient, its variance, and settings."""

import math

import pytest
import torch
from groups import EXACT, bare, ids_of, logits_of, privileged
from loss_problem import draw
from pages import MOMENT, an_older_policy, assert_same_gradients, moved, prepared, raw_logits, weights_after_steps

from trl_opsd.losses import Facts, OutputHead, Target, fused_divergence, fused_fact_loss
from trl_opsd.methods.groups import policy_ratio
from trl_opsd.methods.vopd import VOPD, sampled_loss
from trl_opsd.trainers.vopd import VOPDConfig, VOPDTrainer

SMALL = {"max_completion_length": 40, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
FORMS = {
    "whole baseline": {},
    "baseline of 5 tokens": {"baseline_size": 5},
    "no baseline": {"use_baseline": False},
    "floor": {"use_baseline": False, "ratio_floor_share": 0.45},
}


@pytest.fixture
def build(build_group):
    return build_group


def baseline(log_q, log_p, size):
    """KL(q || p) of one position, over the student's `size` likeliest tokens and renormalised, or over all."""
    kept = log_q.argsort(descending=True)[: len(log_q) if size is None else size]
    log_q, log_p = (log[kept] - log[kept].exp().sum().log() for log in (log_q, log_p))
    return (log_q.exp() * (log_q - log_p)).sum().item()


def advantage_by_hand(log_q, log_p, token, args):
    u = (log_p[token] - log_q[token]).item()
    if args.use_baseline:
        return u + baseline(log_q, log_p, args.baseline_size)
    share = args.ratio_floor_share
    return u if share is None else max(u, math.log(share / (1 - share)))


def loss_by_hand(trainer, student, teacher, rows, old):
    """The mean over tokens, with gradient, the advantages, and how many tokens PPO's clip cut."""
    args, heat = trainer.args, trainer.args.temperature
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    total, advantages, cut = 0.0, [], 0
    for index, row in enumerate(rows):
        completion = completions[index][: args.distillation_length]
        read = privileged(trainer, row, args.teacher_prompt_template, row["solution"])
        log_p = (logits_of(teacher, read, completion) / heat).log_softmax(-1)
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        log_q = (raw_logits(student, plain, completion) / heat).log_softmax(-1)
        for t, token in enumerate(completion):
            now = log_q[t].detach()
            advantage = advantage_by_hand(now, log_p[t], token, args)
            ratio = math.exp(now[token].item() - (now[token].item() if old is None else old[index][t].item()))
            if (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0):
                ratio, cut = 0.0, cut + 1
            advantages.append(advantage)
            total = total - advantage * ratio * log_q[t, token]
    return total / len(advantages), advantages, cut


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("ratios", ["real", "on policy"])
def test_a_step_equals_the_formula_from_raw_logits(build, dataset, form, ratios):
    trainer = build(VOPDTrainer, **SMALL, **form, temperature=1.2)
    teacher = bare(trainer)
    moved(trainer, size=0.02)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    batch, old = prepared(trainer, rows), None
    if ratios == "real":
        old = an_older_policy(trainer, batch)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, advantages, cut = loss_by_hand(trainer, student, teacher, rows, old)
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), **EXACT)
    assert_same_gradients(trainer.model, student)
    assert (cut > 5) == (ratios == "real")
    assert max(advantages) > 0.05 and min(advantages) < -0.05
    if "ratio_floor_share" in form:
        assert min(advantages) == math.log(0.45 / 0.55)


def test_a_cut_length_is_divided_by_the_distilled_tokens_alone(build, dataset):
    trainer = build(VOPDTrainer, **SMALL, distillation_length=3)
    student, rows = bare(trainer), [dataset[index] for index in (0, 3, 5, 7)]
    loss = trainer.compute_loss(trainer.model, prepared(trainer, rows))
    hand, advantages, _ = loss_by_hand(trainer, student, student, rows, None)
    assert loss.item() == pytest.approx(hand.item(), **EXACT) and len(advantages) == 12


def test_with_a_reward_the_step_is_that_of_the_sum_of_both_advantages(build, dataset):
    """On policy and with every token distilled, TRL's loss beside ours is the paper's A + A_t."""
    settings = {**SMALL, "num_generations": 4, "reward_weight": 1.0}
    trainer = build(VOPDTrainer, **settings)
    student, rows = bare(trainer), [dataset[0]] * 4
    batch = prepared(trainer, rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    hand, advantages, _ = loss_by_hand(trainer, student, student, rows, None)
    completions = trainer._generate_single_turn([None] * 4)[0]
    base = dict(zip(batch["rollout_index"].tolist(), batch["advantages"].tolist(), strict=True))
    plain = ids_of(trainer, rows[0]["prompt"], **trainer.args.chat_template_kwargs)
    for index, completion in enumerate(completions):
        log_q = (raw_logits(student, plain, completion) / trainer.args.temperature).log_softmax(-1)
        own = log_q.gather(-1, torch.tensor(completion)[:, None]).sum()
        hand = hand - base[index] * own / len(advantages)
    hand.backward()
    assert any(base.values())
    assert_same_gradients(trainer.model, student)


def enumerated(args, rows=20, size=7, scale=0.3):
    """Gradient (rows, tokens, size) of the page's loss to the logits for every token of every position, and the problem."""
    student, target = scale * draw(rows, size), draw(rows, size, seed=1)
    logits = student.repeat_interleave(size, 0).requires_grad_()
    head, tokens = OutputHead(torch.eye(size, dtype=torch.float64)), torch.arange(size).repeat(rows)

    def loss_of(facts):
        facts.given["old_log_prob"] = facts.log_prob.detach()
        return sampled_loss(facts, args, MOMENT).sum()

    given = {"engine_weight": torch.ones(rows * size, dtype=torch.float64)}
    loss, _ = fused_fact_loss(
        logits,
        head,
        Target(target.repeat_interleave(size, 0)),
        token_ids=tokens,
        loss_of=loss_of,
        given=given,
        divergence=args.loss_divergence(),
    )
    gradient = torch.autograd.grad(loss, logits)[0].view(rows, size, size)
    return gradient, student, target, head


@pytest.mark.parametrize("form", list(FORMS.values())[:3], ids=list(FORMS)[:3])
def test_the_expected_gradient_is_that_of_reverse_kl_with_every_baseline(make_args, form):
    args = make_args(VOPDConfig, **{**form, "baseline_size": 3} if "baseline_size" in form else form)
    gradient, student, target, head = enumerated(args)
    expected = (student.softmax(-1)[..., None] * gradient).sum(1)
    leaf, ones = student.requires_grad_(), torch.ones(len(student), dtype=torch.float64)
    whole = make_args(VOPDConfig).loss_divergence()
    kl, _ = fused_divergence(leaf, head, Target(target), token_weights=ones, divergence=whole)
    torch.testing.assert_close(expected, torch.autograd.grad(kl, leaf)[0], rtol=0, atol=1e-14)


def test_the_baseline_lowers_the_variance_on_a_student_without_a_dominant_token(make_args):
    def variance(**form):
        gradient, student, *_ = enumerated(make_args(VOPDConfig, **form), size=50)
        q = student.softmax(-1)[..., None]
        return ((q * gradient.square()).sum(1) - (q * gradient).sum(1).square()).sum().item()

    with_all, with_some, without = variance(), variance(baseline_size=20), variance(use_baseline=False)
    assert with_all < 0.9 * without and with_some < without


def test_the_floor_is_biased(make_args):
    """Why it is off: rewards that are cut from below no longer make the gradient of reverse KL."""
    gradients = []
    for form in ({"use_baseline": False}, {"use_baseline": False, "ratio_floor_share": 0.45}):
        gradient, student, *_ = enumerated(make_args(VOPDConfig, **form))
        gradients.append((student.softmax(-1)[..., None] * gradient).sum(1))
    assert (gradients[0] - gradients[1]).abs().max() > 0.01


def test_a_token_weighs_by_trainer_over_engine_too(make_args):
    log_prob, advantage = draw(5) - 2, draw(5, seed=1)
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.1], dtype=torch.float64)
    ratios = []
    for engine_weight in (torch.ones(5), weights):
        facts = Facts(log_prob, *[None] * 5, given={"old_log_prob": log_prob, "engine_weight": engine_weight})
        ratios.append(policy_ratio(facts, advantage, make_args(VOPDConfig)))
    assert ratios[0].tolist() == [1.0] * 5 and ratios[1].tolist() == weights.tolist()
    assert make_args(VOPDConfig, engine_weight_cap=2.0).vllm_importance_sampling_correction


def test_one_by_four_equals_two_by_two_accumulation(build):
    settings = {"max_completion_length": 40, "max_steps": 2}
    weights, start = weights_after_steps(build, VOPDTrainer, **settings)
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"divergence": "forward_kl"}, "divergence='forward_kl' is not possible.*Leave it 'reverse_kl'"),
        ({"clip": "upper"}, "clip='upper' is not possible.*Leave it None"),
        ({"baseline_size": 0}, "baseline_size=0.*set it to 1 or more"),
        (
            {"baseline_size": 5, "use_baseline": False},
            "baseline_size=5 with use_baseline=False.*Set baseline_size=None",
        ),
        ({"ratio_floor_share": 0.3}, "ratio_floor_share=0.3 with use_baseline=True.*Set use_baseline=False"),
        ({"ratio_floor_share": 1.0, "use_baseline": False}, r"ratio_floor_share=1.0.*in \(0, 1\)"),
        ({"epsilon": -0.1}, "epsilon=-0.1.*0 or more"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1.*0 or more"),
        ({"delta": 1.0}, "delta=1.0.*above 1"),
        ({"engine_weight_cap": 0.0}, "engine_weight_cap=0.0.*above 0"),
        ({"reward_weight": 1.0}, "num_generations=1 with reward_weight=1.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(make_args, bad, told):
    with pytest.raises(ValueError, match=told):
        make_args(VOPDConfig, **bad)


def test_bounds_of_the_ratio_are_read_without_a_reward_and_do_not_warn(make_args):
    assert make_args(VOPDConfig, epsilon=0.1, epsilon_high=0.3, delta=4.0).delta == 4.0  # warnings are errors


def test_another_temperature_of_the_loss_is_refused_before_training(build):
    with pytest.raises(ValueError, match=r"loss_temperature=0.7 with temperature=1.0"):
        build(VOPDTrainer, **SMALL, loss_temperature=0.7)


def test_the_defaults_are_the_papers():
    args = VOPDConfig(output_dir="out", use_cpu=True, bf16=False)
    # arXiv 2605.07865 and holi-lab/vOPD: learning rate, batch, length; one rollout a prompt; the floor is off.
    assert (args.learning_rate, args.max_completion_length, args.num_generations) == (1e-5, 2048, 1)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert args.use_baseline and args.baseline_size is None and args.ratio_floor_share is None
    # What the sampled token stands for is the whole distribution.
    assert (args.temperature, args.loss_temperature, args.top_p, args.top_k) == (1.0, 1.0, 1.0, 0)
    assert args.loss_divergence().name == "reverse_kl" and not VOPD.needs_reward
