# SPDX-License-Identifier: Apache-2.0
"""MOPD: who reads which peers, SDPO as its special case, and the step by hand."""

import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from groups import TEXTS, ids_of, privileged
from pages import assert_same_step, gradients_of, moved, raw_logits, student_of, whole_step

from trl_opsd.methods.mopd import multi_peer_contexts
from trl_opsd.methods.sdpo import peer_contexts
from trl_opsd.settings.mopd import MOPDSettings
from trl_opsd.settings.sdpo import SDPOSettings
from trl_opsd.teacher.contexts import Moment, Rollout, Unused
from trl_opsd.trainers.mopd import MOPDConfig, MOPDTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer

SMALL = {"max_completion_length": 40, "num_generations": 4, "per_device_train_batch_size": 8, "support_size": 20}
SHORT = {"peer_block": "+{text}", "wrong_block": "-{text}", "feedback_block": "!{text}"}
AS_SDPO = {"max_right_peers": 1, "max_wrong_peers": 0, "strip_thinking": True}


def group_of(rewards, feedback=None):
    texts = feedback or [None] * len(rewards)
    return [Rollout("x", "s", f"<{i}>", reward, note=texts[i]) for i, reward in enumerate(rewards)]


def slots_of(group, seed=0, **settings):
    views = multi_peer_contexts(group, MOPDSettings(**{**SHORT, **settings}), Moment(random.Random(seed)))
    return ["".join(view.slot for view in own) for own in views]


@pytest.mark.parametrize(
    ("rewards", "slots"),
    [
        ([1, 1, 1, 0], ["+<1>+<2>-<3>", "+<0>+<2>-<3>", "+<0>+<1>-<3>", "+<0>+<1>"]),
        ([1, 0], ["-<1>", "+<0>"]),  # a lone winner reads the wrong peer
        ([0, 0], ["-<1>", "-<0>"]),  # a group that is all wrong learns from a wrong peer
        ([1, 1], ["+<1>", "+<0>"]),
        ([1, None, None], ["", "+<0>", "+<0>"]),  # without a reward it is neither
        ([0.4, 0.5], ["+<1>", "-<0>"]),
    ],
)
def test_the_teacher_reads_two_right_peers_and_a_wrong_one(rewards, slots):
    assert slots_of(group_of(rewards)) == slots


def test_feedback_comes_last_and_where_no_peer_is_right_unless_it_is_asked_for():
    group = group_of([1, 0, 0], ["a", "b", None])
    alone = slots_of(group)
    assert alone[0] in ("-<1>!a", "-<2>!a") and alone[1:] == ["+<0>-<2>", "+<0>-<1>"]
    assert slots_of(group, feedback_beside_peer=True)[1:] == ["+<0>-<2>!b", "+<0>-<1>"]


def test_every_wrong_peer_is_read_at_times_and_the_same_on_every_rank():
    group = group_of([1, 0, 0, 0])
    seen = {slots_of(group, seed)[0] for seed in range(40)}
    assert seen == {"-<1>", "-<2>", "-<3>"}
    assert slots_of(group, 3) == slots_of(group, 3)


def test_nothing_to_read_is_told():
    (views,) = multi_peer_contexts(group_of([1]), MOPDSettings(), Moment(random.Random(0)))
    assert isinstance(views, Unused) and views.reason == "no peer"


@pytest.mark.parametrize("seed", range(30))
def test_no_context_holds_its_own_rollout_nor_more_than_it_may(seed):
    draw = random.Random(seed)
    rewards = [draw.choice([0, 0.3, 0.5, 1, None]) for _ in range(draw.randint(1, 9))]
    settings = {"max_right_peers": draw.randint(0, 3), "max_wrong_peers": draw.randint(0, 3)}
    group = group_of(rewards)
    for index, slot in enumerate(slots_of(group, seed, **settings)):
        right = [other for other in range(len(group)) if f"+<{other}>" in slot]
        wrong = [other for other in range(len(group)) if f"-<{other}>" in slot]
        assert f"<{index}>" not in slot
        others = [other for other in range(len(group)) if other != index and rewards[other] is not None]
        assert right == [other for other in others if rewards[other] >= 0.5][: settings["max_right_peers"]]
        assert all(rewards[other] < 0.5 for other in wrong)
        enough = sum(rewards[other] < 0.5 for other in others)
        assert len(wrong) == min(settings["max_wrong_peers"], enough)


@pytest.mark.parametrize("seed", range(10))
def test_the_first_peer_alone_is_what_sdpo_reads(seed):
    draw = random.Random(seed)
    rewards = [draw.choice([0, 1, None]) for _ in range(6)]
    group = group_of(rewards, [draw.choice([None, f"f{index}"]) for index in range(6)])
    group = [replace(own, completion=f"<think>why</think>{own.completion}") for own in group]
    moment = Moment(random.Random(0))
    for beside in (False, True):
        mopd = multi_peer_contexts(group, MOPDSettings(**AS_SDPO, feedback_beside_peer=beside), moment)
        assert mopd == peer_contexts(group, SDPOSettings(feedback_beside_peer=beside), moment)


def rows_of(dataset):
    return [dataset[index] for index in (0, 5) for _ in range(4)]


def test_a_step_with_the_first_peer_alone_is_sdpos(build_group, dataset):
    steps = []
    for trainer_class, settings in ((MOPDTrainer, AS_SDPO), (SDPOTrainer, {})):
        trainer = build_group(trainer_class, TEXTS, **SMALL, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, rows_of(dataset)))
    assert steps[0][0] == steps[1][0]
    assert_same_step(*steps, rel=1e-12)


def blocks_by_hand(trainer, texts, index, draw):
    args, start = trainer.args, index // 4 * 4
    others = [other for other in range(start, start + 4) if other != index]
    right = [texts[other] for other in others if "boxed" in texts[other]]
    wrong = [texts[other] for other in others if "boxed" not in texts[other]]
    drawn = draw.sample(range(len(wrong)), 1) if wrong else []
    blocks = "".join(args.peer_block.replace("{text}", text) for text in right[:2])
    blocks += "".join(args.wrong_block.replace("{text}", wrong[place]) for place in drawn)
    return blocks if right else blocks + args.feedback_block.replace("{text}", "test 2 failed")


def test_a_step_equals_its_formula_from_raw_logits(build_group, dataset):
    dataset = Dataset.from_list([{**row, "feedback": "test 2 failed"} for row in dataset])
    trainer = build_group(MOPDTrainer, TEXTS, rows=dataset, teacher_model_kind="live", **SMALL)
    moved(trainer)
    model, rows, total, count = student_of(trainer), rows_of(dataset), 0.0, 0
    completions, draw = trainer._generate_single_turn([None] * 8)[0], random.Random(f"{trainer.args.seed}/0")
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        blocks = blocks_by_hand(trainer, texts, index, draw)
        teacher = privileged(trainer, row, trainer.args.peer_prompt_template, blocks)
        own = raw_logits(model, ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs), completion)
        kept = own.topk(20, dim=-1).indices
        q, p = (
            logits.softmax(-1).gather(-1, kept) for logits in (own, raw_logits(model, teacher, completion).detach())
        )
        q, p = (torch.cat([side, 1 - side.sum(-1, keepdim=True)], dim=-1) for side in (q, p))
        m = (q + p) / 2
        total = total + ((q * (q / m).log()).sum() + (p * (p / m).log()).sum()) / 2
        count += len(completion)
    loss = total / count
    loss.backward()
    got = whole_step(trainer, rows)
    assert_same_step(got, (loss.item(), gradients_of(model)))
    assert got[0] > 1e-3 and trainer._buffered_inputs[0]["distillation_mask"].any(1).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_right_peers": -1}, "max_right_peers=-1"),
        ({"max_wrong_peers": -1}, "max_wrong_peers=-1"),
        ({"wrong_block": "so"}, "wrong_block does not contain {text}"),
        ({"importance_cap": 0.0}, "importance_cap=0.0"),
        ({"feedback_block": "so"}, "feedback_block does not contain {text}"),
        ({"num_generations": 1}, "num_generations=1"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(MOPDConfig, **{**SMALL, **bad})


def test_the_defaults_are_those_of_the_papers_run(make_args):
    length = MOPDConfig.max_completion_length
    args = make_args(MOPDConfig, per_device_train_batch_size=8, max_completion_length=length)
    # viviable/mopd_code, README and run_local_sdpo.sh, of arXiv 2605.12652: FAMILY_A 8.
    divergence = args.loss_divergence()
    assert (divergence.name, divergence.mixture_weight, divergence.support.k) == ("jsd", 0.5, 100)
    assert (args.max_right_peers, args.max_wrong_peers, args.strip_thinking) == (2, 1, False)
    assert not args.feedback_beside_peer  # environment_feedback_only_without_solution: True
    assert (args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps) == ("ema", 0.05, None)
    assert (args.learning_rate, args.num_generations, args.max_completion_length) == (1e-5, 8, 4096)
    assert args.chat_template_kwargs == args.teacher_chat_template_kwargs == {"enable_thinking": False}
