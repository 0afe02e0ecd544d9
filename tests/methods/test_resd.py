# SPDX-License-Identifier: Apache-2.0
"""RESD: who reads what, what is remembered, the step by hand, and SDPO's loss as its special case."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from groups import ids_of, privileged, reward_boxed
from pages import MOMENT, assert_same_step, gradients_of, moved, raw_logits, student_of, whole_step

from trl_opsd.methods.base import Seen
from trl_opsd.methods.resd import RESD, experience_contexts, outcome_memory, outcome_report, prompt_key, review_request
from trl_opsd.methods.sdpo import SDPO
from trl_opsd.settings.resd import RESDSettings
from trl_opsd.teacher.contexts import Rollout, TeacherContext, Written
from trl_opsd.trainers.resd import RESDConfig, RESDTrainer
from trl_opsd.trainers.sdpo import SDPOTrainer

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
REVIEWS = ("add in order", "never asked", "carry {prompt}", "<think>hm</think>box it")
SMALL = {
    "max_completion_length": 40,
    "support_size": 20,
    "per_device_train_batch_size": 4,
    "write_playbook": False,  # which test_playbook.py has
}
SHORT = {
    "attempt_block": "a{text}",
    "feedback_block": "!{text}",
    "review_block": "?{text}",
    "solution_block": "+{text}",
}


def settings_of(**own):
    return RESDSettings(**{**SHORT, **own})


def rollout_of(reward, prompt="x", text="<think>why</think>y", **known):
    return Rollout(prompt, None, text, reward, **known)


def slot_of(rollout, kept=None, **own):
    moment = replace(MOMENT, memory={"solutions": kept or {}})
    (views,) = experience_contexts([rollout], settings_of(**own), moment)
    return views[0].slot if views else views.reason


REVIEW = {"written": Written("<think>hm</think>z", [1])}
KEPT = {prompt_key(rollout_of(None)): "old"}


@pytest.mark.parametrize(
    ("rollout", "kept", "slot"),
    [
        (rollout_of(0.0, note="f", **REVIEW), KEPT, "ay!f?z+old"),
        (rollout_of(0.0, **REVIEW), {}, "ay?z"),
        (rollout_of(0.0, note="f"), {}, "ay!f"),
        (rollout_of(0.0), KEPT, "ay+old"),
        (rollout_of(0.0, "another"), KEPT, "nothing learnt"),
        (rollout_of(0.0, note=" "), {}, "nothing learnt"),
        (rollout_of(1.0), {}, "ay+y"),  # its own text is allowed
        (rollout_of(0.5, note="f"), KEPT, "ay!f+y"),  # and newer than what was kept
        (rollout_of(None, note="f"), KEPT, "no reward"),
    ],
)
def test_the_teacher_reads_the_attempt_feedback_review_and_a_right_rollout(rollout, kept, slot):
    assert slot_of(rollout, kept) == slot


def test_without_kept_solutions_a_right_rollout_has_nothing_to_learn_from_but_feedback():
    assert slot_of(rollout_of(1.0), max_kept_solutions=0) == "nothing learnt"
    assert slot_of(rollout_of(1.0, note="f"), max_kept_solutions=0) == "ay!f"
    assert slot_of(rollout_of(0.0, note="f"), strip_thinking=False) == "a<think>why</think>y!f"


def test_only_wrong_rollouts_are_reviewed_with_their_feedback():
    view = review_request(rollout_of(0.4, note="f"), settings_of(max_rollout_context_length=7))
    assert view == TeacherContext("review", "ay!f", 7, weights="live")
    assert review_request(rollout_of(0.5), settings_of()) is review_request(rollout_of(None), settings_of()) is None
    assert review_request(rollout_of(0.0), settings_of(write_review=False)) is None


def seen_of(*rollouts):
    return Seen(rollouts, [], [])


def test_the_last_right_rollout_of_each_prompt_is_kept_and_the_oldest_go_first():
    settings, memory = settings_of(max_kept_solutions=2), {}
    for prompt, reward, text in [("x", 1, "x1"), ("y", 1, "y1"), ("y", 0, "y2"), ("x", 1, "x2"), ("z", 1, "z1")]:
        memory = outcome_memory(memory, seen_of(rollout_of(reward, prompt, text)), settings)
    assert list(memory["solutions"].values()) == ["x2", "z1"]  # y is the one that was kept longest
    report = outcome_report(memory)
    assert report == {
        "right_weight": 1.0,
        "wrong_weight": 1.0,
        "kept_solutions": 2,
        "lessons": 0,
        "unread_lessons": 0,
    }
    assert outcome_memory(memory, seen_of(), settings_of(max_kept_solutions=0))["solutions"] == {}


def test_the_batchs_share_of_right_rollouts_decides_the_weights():
    batch = [rollout_of(reward) for reward in (1.0, 0.0, 0.2, 0.0, None)]
    weights = outcome_memory({}, seen_of(*batch), settings_of())["weights"]
    assert weights == pytest.approx([(1 - 1 / 4) / (3 / 8), (1 / 4) / (3 / 8)])


@pytest.fixture
def build(build_group, monkeypatch):
    """A trainer that samples its rollouts first and its reviews second, and remembers what was asked."""

    def build(trainer_class=RESDTrainer, **settings):
        settings = {**SMALL, **settings}
        if not issubclass(trainer_class, RESDTrainer):
            del settings["write_playbook"]
        trainer = build_group(trainer_class, TEXTS, **settings)
        trainer.asked = []

        def sample(prompts, *args, **kwargs):
            trainer.asked.append(prompts)
            texts = REVIEWS if len(trainer.asked) % 2 == 0 else TEXTS
            return [completion_of(trainer, text) for text in texts], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        return trainer

    return build


def completion_of(trainer, text):
    return [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]


def blocks_of(args, index, *, with_review):
    """What the teacher reads of the rollout at `index`, or the model that reviews it."""
    blocks = args.attempt_block.replace("{text}", TEXTS[index])
    if with_review and index == 1:
        return blocks + args.solution_block.replace("{text}", TEXTS[index])
    review = REVIEWS[index].removeprefix("<think>hm</think>")
    return blocks + with_review * args.review_block.replace("{text}", review)


def prompt_of(trainer, template, row, blocks):
    """By parts: a review that spells `{prompt}` stays as it is."""
    text = template.replace("{solution}", blocks) if "{prompt}" not in blocks else None
    if text is not None:
        return privileged(trainer, row, text, "")
    before, middle, after = (*template.partition("{prompt}{solution}"),)
    assert middle
    content = before + row["prompt"][-1]["content"] + blocks + after
    return ids_of(trainer, [{"role": "user", "content": content}], **trainer.args.teacher_chat_template_kwargs)


def floored_reverse_kl(own, target, floor, k=20):
    """KL(q || max(p, floor q)) over the student's k likeliest tokens and the rest, p not put to 1 again, (T,)."""
    kept = own.topk(k, dim=-1).indices
    q, p = (logits.softmax(-1).gather(-1, kept) for logits in (own, target))
    q, p = (torch.cat([side, 1 - side.sum(-1, keepdim=True)], dim=-1) for side in (q, p))
    floored = torch.maximum(p, floor * q.detach())
    return (q * (q / floored).log()).sum(-1), (floored > p).any()


def by_hand(trainer, rows, weights, floor):
    args, model, total, count, bound = trainer.args, student_of(trainer), 0.0, 0, False
    for index, (row, text) in enumerate(zip(rows, TEXTS, strict=True)):
        completion, student = completion_of(trainer, text), ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        blocks = blocks_of(args, index, with_review=True)
        teacher = prompt_of(trainer, args.experience_prompt_template, row, blocks)
        own, target = raw_logits(model, student, completion), raw_logits(model, teacher, completion).detach()
        values, binds = floored_reverse_kl(own, target, floor)
        total, count, bound = total + weights[index == 1] * values.sum(), count + len(completion), bound or binds
    loss = total / count
    loss.backward()
    return (loss.item(), gradients_of(model)), bound


@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("balance", [False, True])
def test_a_step_equals_its_formula_from_raw_logits(build, dataset, floor, balance):
    trainer = build(teacher_model_kind="live", target_share_floor=floor, balance_outcomes=balance)
    moved(trainer)
    rows = [dataset[index] for index in range(4)]
    share = 1 / 4
    mean = 2 * share * (1 - share)
    weights = [share / mean, (1 - share) / mean] if balance else [1.0, 1.0]
    wanted, bound = by_hand(trainer, rows, weights, floor)
    assert bound == (floor > 0)
    assert_same_step(whole_step(trainer, rows), wanted)
    asked = trainer.asked[1]
    for index in (0, 2, 3):
        blocks = blocks_of(trainer.args, index, with_review=False)
        assert asked[index] == prompt_of(trainer, trainer.args.review_prompt_template, rows[index], blocks)
    assert trainer._metrics["train"]["written/texts"] == [3]


def test_without_floor_and_weights_the_loss_is_sdpos(build, dataset):
    def contexts(group, settings, moment):
        return [(TeacherContext("teacher", rollout.solution, anchor=1.0),) for rollout in group]

    steps = []
    for owner, method, own in (
        (RESDTrainer, RESD, {"target_share_floor": 0.0, "balance_outcomes": False, "num_generations": 4}),
        (SDPOTrainer, SDPO, {"divergence": "reverse_kl", "num_generations": 4}),
    ):
        changed = replace(method, contexts=contexts, asks=None)
        shared = {
            "chat_template_kwargs": {"enable_thinking": False},
            "teacher_chat_template_kwargs": None,
            "top_p": 1.0,
        }
        trainer = build(type("Changed", (owner,), {"method": changed}), teacher_model_kind="base", **shared, **own)
        moved(trainer)
        steps.append(whole_step(trainer, [dataset[1]] * 4))
    assert steps[0][0] == steps[1][0] > 0.01
    assert_same_step(*steps, rel=1e-12)


def test_a_wrong_rollout_reads_what_was_right_in_an_earlier_batch(build, dataset):
    trainer = build(write_review=False)
    rows = [dataset[index] for index in range(4)]
    whole_step(trainer, rows)
    assert list(trainer.memory["solutions"].values()) == [TEXTS[1]]
    assert [bool(views) for views in trainer._batch.contexts] == [False, True, False, False]
    trainer.asked.clear()  # the next call samples rollouts again
    whole_step(trainer, [rows[1], rows[0], rows[3], rows[2]])  # whose first prompt was right, and is not now
    views = trainer._batch.contexts
    assert [bool(own) for own in views] == [True, True, False, False]
    assert views[0][0].slot.endswith(trainer.args.solution_block.replace("{text}", TEXTS[1]))
    assert list(trainer.memory["solutions"].values()) == [TEXTS[1]] * 2


def test_what_is_remembered_survives_save_and_load(make_model, make_args, dataset, tokenizer, tmp_path):
    """The second run starts from the first one's checkpoint, and shows a kept solution that it has not seen made."""
    runs = []
    for texts, checkpoint in (((TEXTS[1],), None), ((TEXTS[0],), tmp_path / "run" / "checkpoint-1")):
        steps = {"max_steps": 1 if checkpoint is None else 2, "save_strategy": "steps", "save_steps": 1}
        trainer = RESDTrainer(
            model=make_model(torch.float64),
            reward_funcs=reward_boxed,
            args=make_args(RESDConfig, output_dir=str(tmp_path / "run"), shuffle_dataset=False, **SMALL, **steps),
            train_dataset=Dataset.from_list([dataset[index] for index in range(4)]),
            processing_class=copy.deepcopy(tokenizer),
        )
        ids = [completion_of(trainer, text) for text in texts] * 4
        trainer._generate_single_turn = lambda *args, ids=ids, **kwargs: (ids, None)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        runs.append(trainer)
    first, second = runs
    assert len(first.memory["solutions"]) == 4 and first.memory == second.memory
    shown = second.args.solution_block.replace("{text}", TEXTS[1])
    assert all(views[0].slot.endswith(shown) for views in second._batch.contexts)


def test_a_run_reviews_its_own_rollouts(build_group):
    trainer = build_group(RESDTrainer, TEXTS, **{**SMALL, "max_completion_length": 8}, max_steps=2, learning_rate=0.05)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["loss"]) and entry["written/texts"] == 3 and entry["method/kept_solutions"] == 1


def test_without_a_reward_it_is_refused(make_model, make_args, dataset, tokenizer):
    with pytest.raises(ValueError, match="RESD needs to know which rollouts are right"):
        RESDTrainer(
            model=make_model(),
            args=make_args(RESDConfig, **SMALL),
            train_dataset=dataset.remove_columns("solution"),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target_share_floor": 1.0}, "target_share_floor=1.0"),
        ({"target_share_floor": -0.1}, "target_share_floor=-0.1"),
        ({"support_size": 0}, "support_size=0"),
        ({"max_kept_solutions": -1}, "max_kept_solutions=-1"),
        ({"max_rollout_context_length": 0}, "max_rollout_context_length=0"),
        ({"importance_cap": 0.0}, "importance_cap=0.0"),
        ({"engine_weight_cap": -1.0}, "engine_weight_cap=-1.0"),
        ({"feedback_function": "report"}, "feedback_function='report'"),
        ({"attempt_block": "so"}, "attempt_block does not contain {text}"),
        ({"review_prompt_template": "{prompt}"}, "review_prompt_template does not contain {solution}"),
        ({"experience_prompt_template": "{solution}"}, "experience_prompt_template does not contain {prompt}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(RESDConfig, **{**SMALL, **bad})


def test_the_defaults_are_those_of_the_official_script(make_args):
    length = RESDConfig.max_completion_length
    args = make_args(RESDConfig, max_completion_length=length)
    # horizon-llm/RESD, selfevolve/resd/run_manufactoria_has_resd_stream_qwen3_4b_fsdp.sh, of arXiv 2605.12741: FAMILY_A 16.
    divergence = args.loss_divergence()
    assert (divergence.name, divergence.relative_floor, divergence.clip) == ("reverse_kl", 0.2, None)
    assert (divergence.support.k, divergence.support.of, divergence.support.remainder) == (100, "student", "tail")
    assert (args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps) == ("ema", 1e-4, None)
    assert (args.learning_rate, args.warmup_steps, args.num_generations) == (1e-6, 10, 1)
    assert (args.temperature, args.top_p, args.max_completion_length) == (1.0, 0.95, 20_480)
    assert args.balance_outcomes and args.write_review and args.strip_thinking
    assert args.chat_template_kwargs == args.teacher_chat_template_kwargs == {"enable_thinking": True}
    assert RESDConfig.per_device_train_batch_size * RESDConfig.gradient_accumulation_steps == 32
