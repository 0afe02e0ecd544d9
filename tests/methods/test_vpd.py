# SPDX-License-Identifier: Apache-2.0
"""VPD: an M-step and an E-step by hand from raw logits, SDPO without E-steps, the running midpoint, and settings."""

import math
import random
from dataclasses import replace

import pytest
import torch
from groups import TEXTS, ids_of, privileged
from pages import (
    an_older_policy,
    assert_same_step,
    gradients_of,
    moved,
    prepared,
    raw_logits,
    student_of,
    token_log_probs,
    whole_step,
)

from trl_opsd import SDPOTrainer
from trl_opsd.experimental.vpd.expectation import is_expectation, running_midpoint
from trl_opsd.experimental.vpd.settings import VPDSettings
from trl_opsd.experimental.vpd.siblings import judged_sequences, variational_contexts
from trl_opsd.experimental.vpd.trainer import VPDConfig, VPDTrainer
from trl_opsd.methods import Seen
from trl_opsd.teacher.contexts import Moment, Rollout, Unused

SMALL = {
    "max_completion_length": 40,
    "distillation_length": None,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "support_size": 20,
}
E_STEP = 1  # with one M-step before it


@pytest.fixture
def build(build_group, make_model):
    """A trainer whose head does not train."""

    def build(trainer=VPDTrainer, **settings):
        model = make_model(torch.float64)
        model.lm_head.requires_grad_(False)
        return build_group(trainer, TEXTS, model=model, **{**SMALL, **settings})

    return build


def rows_of(dataset):
    return [dataset[index] for index in (0, 5) for _ in range(4)]


def contexts_by_hand(trainer, rows, *, contrasts=True):
    """Of each rollout its ids, whether it is right, its bare prompt, and the teacher's or None."""
    args = trainer.args
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        group = [place for place in range(index // 4 * 4, index // 4 * 4 + 4) if place != index]
        right = [texts[place] for place in group if "boxed" in texts[place]]
        wrong = [texts[place] for place in group if "boxed" not in texts[place]]
        shown = [args.peer_block.replace("{text}", right[0])] if right else []
        shown += [args.wrong_block.replace("{text}", wrong[0])] if wrong and contrasts else []
        plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        teacher = privileged(trainer, row, args.peer_prompt_template, "".join(shown)) if shown else None
        yield completion, "boxed" in texts[index], plain, teacher


def log_prob_of(trainer, model, context, completion):
    return token_log_probs(raw_logits(model, context, completion), completion, trainer.args.loss_temperature).sum()


def e_step_by_hand(trainer, rows, beta=0.1, weight=0.1):
    """Loss and gradients, and what delta is after this batch: the midpoint of the means of r."""
    model, judged = student_of(trainer), []
    for completion, is_right, plain, teacher in contexts_by_hand(trainer, rows):
        taught = log_prob_of(trainer, model, teacher, completion)
        with torch.no_grad():
            bare = log_prob_of(trainer, model, plain, completion)
        judged.append((beta * (taught - bare), is_right))
    means = [
        sum(r.item() for r, right in judged if right is side) / sum(right is side for _, right in judged)
        for side in (True, False)
    ]
    delta = sum(means) / 2
    loss = sum(torch.log1p((-(r - delta) if right else (r - delta)).exp()) for r, right in judged)
    loss = weight * loss / len(judged)
    loss.backward()
    return (loss.item(), gradients_of(model)), delta


def test_an_e_step_trains_the_teachers_prompt_by_its_formula_from_raw_logits(build, dataset):
    trainer = build(maximization_steps=1)
    moved(trainer)
    trainer.state.global_step = E_STEP
    got = whole_step(trainer, rows_of(dataset))
    wanted, delta = e_step_by_hand(trainer, rows_of(dataset))
    assert_same_step(got, wanted)
    assert trainer.memory["midpoint"] == pytest.approx(delta, rel=1e-5)
    assert abs(wanted[0] - 0.1 * math.log(2)) > 1e-4


def test_the_gradient_of_an_e_step_is_minus_beta_sigmoid_times_that_of_log_t(build, dataset):
    trainer = build(maximization_steps=1, reward_beta=0.3, expectation_weight=1.0)
    moved(trainer)
    trainer.state.global_step = E_STEP
    got = whole_step(trainer, rows_of(dataset))
    delta, model, surrogate = trainer.memory["midpoint"], student_of(trainer), 0.0
    for completion, is_right, plain, teacher in contexts_by_hand(trainer, rows_of(dataset)):
        taught = log_prob_of(trainer, model, teacher, completion)
        with torch.no_grad():
            r = 0.3 * (taught.detach() - log_prob_of(trainer, model, plain, completion))
        factor = torch.sigmoid(delta - r) if is_right else -torch.sigmoid(r - delta)
        surrogate = surrogate - 0.3 * factor * taught / 8
    surrogate.backward()
    assert_same_step(got, (got[0], gradients_of(model)))


@pytest.mark.parametrize("step", [0, 2])
def test_an_m_step_without_contrast_is_a_step_of_sdpo_with_reverse_kl_and_a_live_teacher(build, dataset, step):
    trainer = build(maximization_steps=1, show_wrong_sibling=False)
    other = build(SDPOTrainer, divergence="reverse_kl", teacher_model_kind="live")
    steps = []
    for each in (trainer, other):
        moved(each)
        each.state.global_step = step
        steps.append(whole_step(each, rows_of(dataset)))
    assert_same_step(*steps)
    assert abs(steps[0][0]) > 1e-3


def test_without_e_steps_every_step_is_sdpos(build, dataset):
    trainer = build(maximization_steps=None, show_wrong_sibling=False)
    other = build(SDPOTrainer, divergence="reverse_kl", teacher_model_kind="live")
    for each in (trainer, other):
        moved(each)
        each.state.global_step = 5
    assert_same_step(whole_step(trainer, rows_of(dataset)), whole_step(other, rows_of(dataset)))


def test_an_m_step_weighs_tokens_by_the_ratio_to_the_policy_that_sampled_as_sdpo_does(build, dataset):
    steps = []
    for owner, settings in (
        (VPDTrainer, {"show_wrong_sibling": False}),
        (SDPOTrainer, {"divergence": "reverse_kl", "teacher_model_kind": "live"}),
    ):
        trainer = build(owner, **settings)
        moved(trainer)
        torch.manual_seed(0)  # of TRL's shuffle
        batch = prepared(trainer, rows_of(dataset))
        plain = trainer.compute_loss(trainer.model, batch).item()
        an_older_policy(trainer, batch)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert abs(loss.item() - plain) > 1e-4
        steps.append((loss.item(), gradients_of(trainer.model)))
    assert_same_step(*steps)


@pytest.mark.parametrize("step", [0, E_STEP])
def test_four_micro_batches_of_two_are_one_of_eight(build, dataset, step):
    steps = []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        trainer = build(maximization_steps=1, **settings)
        moved(trainer)
        trainer.state.global_step = step
        steps.append(whole_step(trainer, rows_of(dataset)))
    assert_same_step(*steps)


def test_every_sixth_step_is_an_e_step():
    settings = VPDSettings()
    assert [step for step in range(18) if is_expectation(step, settings)] == [5, 11, 17]
    assert not any(is_expectation(step, VPDSettings(maximization_steps=None)) for step in range(18))


def rollout(text, reward, **changes):
    return replace(Rollout("1+1=?", None, text), reward=reward, **changes)


def test_the_teacher_reads_the_first_right_and_the_first_wrong_sibling_and_never_the_rollout_itself():
    group = [rollout("r1", 1.0), rollout("w1", 0.0), rollout("r2", 1.0), rollout("w2", 0.0)]
    settings = VPDSettings(peer_block="<{text}>", wrong_block="[{text}]")
    moment = Moment(random.Random(0), 0)
    shown = [views[0].slot for views in variational_contexts(group, settings, moment)]
    assert shown == ["<r2>[w1]", "<r1>[w2]", "<r1>[w1]", "<r1>[w1]"]
    assert judged_sequences(group, settings, moment) == [None] * 4
    (alone,) = variational_contexts(group[:1], settings, moment)
    assert isinstance(alone, Unused) and alone.reason == "no sibling to show"


def test_an_e_step_reads_both_prompts_and_leaves_rollouts_without_a_reward_out():
    group = [rollout("r1", 1.0), rollout("w1", 0.0), rollout("?", None)]
    settings, moment = VPDSettings(), Moment(random.Random(0), 5)
    contexts = variational_contexts(group, settings, moment)
    assert [[view.template for view in views] for views in contexts] == [["peer", "peer", "plain"]] * 2 + [[]]
    assert contexts[2].reason == "no reward"
    extras = judged_sequences(group, settings, moment)
    assert [None if extra is None else (extra.sequence, extra.prompt.slot) for extra in extras] == [
        (None, contexts[0][0].slot),
        (None, contexts[1][0].slot),
        None,
    ]


def test_turns_of_tools_are_refused():
    with pytest.raises(ValueError, match="turns of tools"):
        judged_sequences(
            [rollout("a", 1.0, turns=({"role": "tool", "content": "4"},))], VPDSettings(), Moment(random.Random(0))
        )


def seen(*pairs):
    rollouts = [rollout("a", reward) for reward, _ in pairs]
    numbers = [torch.tensor([[taught, 0.0], [0.0, 0.0]], dtype=torch.float64) for _, taught in pairs]
    return Seen(rollouts, numbers, numbers)


def test_the_midpoint_moves_by_its_momentum_and_only_where_there_are_right_and_wrong_rollouts():
    settings = VPDSettings(reward_beta=0.5, midpoint_momentum=0.75)
    first = running_midpoint({}, seen((1.0, 4.0), (0.0, -2.0), (0.0, -4.0)), settings)
    assert first == {"midpoint": pytest.approx(0.5 * (4 - 3) / 2)}
    later = running_midpoint(first, seen((1.0, 8.0), (0.0, 0.0)), settings)
    assert later["midpoint"] == pytest.approx(0.75 * 0.25 + 0.25 * 2.0)
    assert running_midpoint(later, seen((1.0, 8.0), (1.0, 0.0)), settings) == later
    nothing = Seen([rollout("a", 1.0)], [torch.zeros(0, 3)], [torch.zeros(0, 3)])
    assert running_midpoint(later, nothing, settings) == later


BAD = [
    ({"maximization_steps": 0}, "maximization_steps=0"),
    ({"reward_beta": 0.0}, "reward_beta=0.0"),
    ({"expectation_weight": 0.0}, "expectation_weight=0.0"),
    ({"midpoint_momentum": 1.0}, "midpoint_momentum=1.0"),
    ({"teacher_model_kind": "base"}, "teacher_model_kind='base'"),
    ({"distillation_length": 8}, "distillation_length=8"),
    ({"num_loss_tokens_to_skip": 1}, "num_loss_tokens_to_skip=1"),
    ({"steps_per_generation": 2, "gradient_accumulation_steps": 1}, "steps_per_generation=2"),
    ({"num_iterations": 2}, "num_iterations=2"),
    ({"wrong_block": "nothing"}, "wrong_block"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:30])
def test_a_setting_outside_its_range_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        VPDConfig(str(tmp_path), bf16=False, use_cpu=True, **changes)


def test_the_settings_are_the_papers_as_far_as_they_are_known():
    settings = VPDSettings()
    assert (settings.maximization_steps, settings.reward_beta) == (5, 0.1)
    assert (settings.divergence, settings.teacher_model_kind, settings.clip) == ("reverse_kl", "live", None)
