# SPDX-License-Identifier: Apache-2.0
"""The collapse guard: silent while a run learns, loud when it falls apart, and it can stop it."""

import json
import random
import string
import warnings
import zlib
from importlib.resources import files
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from trl_opsd import OGLSSDTrainer, OPSDTrainer
from trl_opsd.monitoring.guard import (
    LEAST_CLIP_AGREEMENT,
    LEAST_ENTROPY_GAP,
    LIMITS,
    AnswerWarning,
    ClipWarning,
    CollapseGuard,
    TeacherWarning,
)
from trl_opsd.monitoring.repetition import is_loop, repeated_share
from trl_opsd.trainers.rollout_log import count_rollouts, measure_rollouts

START = {
    "divergence": 0.2,
    "student_entropy": 0.5,
    "completions/mean_length": 400.0,
    "reflection_markers_per_1000": 5.0,
    "completions/repetition": 0.1,
    "completions/looping_ratio": 0.0,
}


def play(guard, *changes, tokens=10_000):
    """Log the start and then each change of it; returns the warnings and the control."""
    state = SimpleNamespace(log_history=[], is_world_process_zero=True)
    control = TrainerControl()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index, change in enumerate([{}, *changes]):
            state.log_history.append(START | {"step": 1 + 10 * index, "num_tokens": tokens * (index + 1)} | change)
            guard.on_log(None, state, control)
    return [str(warning.message) for warning in caught], control


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"divergence": 0.41}, ("unclipped divergence in nats per token: 0.41, was 0.2", "lower learning_rate")),
        ({"completions/mean_length": 1250.0}, ("completion length in tokens: 1.25e+03, was 400", "no longer end")),
        ({"completions/mean_length": 90.0}, ("completion length in tokens: 90, was 400", "break off")),
        ({"student_entropy": 1.6}, ("entropy in nats per token: 1.6, was 0.5", "lower learning_rate")),
        ({"student_entropy": 0.02}, ("entropy in nats per token: 0.02, was 0.5", "stops exploring")),
        ({"reflection_markers_per_1000": 45.0}, ("markers per 1,000 tokens: 45, was 5", "PurifiedOPSDTrainer")),
        ({"reflection_markers_per_1000": 0.2}, ("markers per 1,000 tokens: 0.2, was 5", "stops reflecting")),
        ({"completions/repetition": 0.4}, ("share of repeated 4-grams: 0.4, was 0.1", "loop")),
        ({"completions/looping_ratio": 0.2}, ("share of long rollouts that loop: 0.2, was 0", "loop")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else next(iter(value)),
)
def test_a_number_out_of_the_range_of_the_start_is_told_with_what_to_try(change, told):
    (text,), control = play(CollapseGuard(), change)
    assert text.startswith("Collapse guard at step 11, against step 1:")
    for part in told:
        assert part in text
    assert not control.should_training_stop


def test_stop_ends_the_run_too():
    (text,), control = play(CollapseGuard("stop"), {"divergence": 0.7})
    assert control.should_training_stop and "guard='stop'" in text


def test_each_number_is_told_once_a_direction():
    longer, shorter = {"completions/mean_length": 1300.0}, {"completions/mean_length": 50.0}
    texts, _ = play(CollapseGuard(), longer, longer, shorter, longer)
    assert len(texts) == 2


def test_it_is_silent_while_numbers_move_as_a_learning_run_moves_them():
    healthy = {
        "divergence": 0.05,
        "student_entropy": 0.1,
        "completions/mean_length": 250.0,
        "reflection_markers_per_1000": 18.0,
        "completions/repetition": 0.2,
    }
    assert play(CollapseGuard(), healthy, healthy)[0] == []


def test_a_multiple_of_nearly_nothing_is_nothing():
    start = {"divergence": 0.001, "student_entropy": 0.001, "reflection_markers_per_1000": 0.0}
    later = {"divergence": 0.01, "student_entropy": 0.02, "reflection_markers_per_1000": 3.0}
    state = SimpleNamespace(log_history=[START | start | {"step": 1, "num_tokens": 5000}], is_world_process_zero=True)
    state.log_history.append(START | later | {"step": 2, "num_tokens": 10_000})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CollapseGuard().on_log(None, state, TrainerControl())


def test_logs_over_few_tokens_are_neither_start_nor_alarm():
    assert play(CollapseGuard(), {"divergence": 9.0}, tokens=999)[0] == []
    assert len(play(CollapseGuard(), {"divergence": 9.0}, tokens=1000)[0]) == 1


def test_a_log_without_some_numbers_is_judged_by_the_others():
    assert len(play(CollapseGuard(), {"completions/mean_length": None, "divergence": 2.0})[0]) == 1


def test_an_evaluation_in_the_history_is_no_training_log():
    guard = CollapseGuard()
    state = SimpleNamespace(log_history=[START | {"step": 1, "num_tokens": 5000}], is_world_process_zero=True)
    state.log_history += [{"eval_divergence": 9.0, "step": 1, "num_tokens": 5000}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.on_log(None, state, TrainerControl())


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="action='loud'"):
        CollapseGuard("loud")


@pytest.mark.parametrize(("guard", "count"), [("off", 0), ("warn", 1), ("stop", 1)])
def test_the_config_adds_it(make_model, make_args, dataset, tokenizer, guard, count):
    trainer = OPSDTrainer(make_model(), args=make_args(guard=guard), train_dataset=dataset, processing_class=tokenizer)
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CollapseGuard)]
    assert len(found) == count and all(callback.action == guard for callback in found)


def test_a_divergence_that_grows_by_plan_is_not_watched(make_model, make_args, dataset, tokenizer):
    def watched(trainer_class, **settings):
        args = make_args(trainer_class.config_class, **settings)
        trainer = trainer_class(model=make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
        (guard,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, CollapseGuard))
        return "divergence" in {limit.key for limit in guard.limits}

    group = {"num_generations": 4, "max_completion_length": 8, "distillation_length": 8}
    assert watched(OPSDTrainer)
    assert watched(OGLSSDTrainer, **group, steering_warmup_steps=0)
    assert not watched(OGLSSDTrainer, **group, steering_warmup_steps=3, max_steps=5)


def test_every_watched_number_is_logged(make_model, make_args, dataset, tokenizer, given_rollouts):
    trainer = OPSDTrainer(make_model(), args=make_args(), train_dataset=dataset, processing_class=tokenizer)
    given_rollouts(trainer, ("1+1+1+1+1+1",)).train()
    logged = next(entry for entry in trainer.state.log_history if "divergence" in entry)
    assert {limit.key for limit in LIMITS} <= logged.keys()
    # Eight tokens 1+1+1+1+ hold five 4-grams, of which two are new.
    assert logged["completions/repetition"] == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("rollouts", "share"),
    [
        ([[1, 2, 3, 4, 5, 6]], 0.0),
        ([[1, 2, 3]], 0.0),
        ([], 0.0),
        ([[1] * 10], 6 / 7),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),  # rollouts may resemble each other
        ([[1, 2, 3, 4, 1, 2, 3, 4], [9] * 5], (1 + 1) / (5 + 2)),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before_in_the_same_rollout(rollouts, share):
    assert repeated_share(rollouts) == pytest.approx(share)


NOISE = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=20_000))
LOOP = "wait, let me look again. " * 800


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (LOOP, True),
        (NOISE, False),
        (NOISE + LOOP, True),
        (LOOP + NOISE, False),
        (NOISE[:5000] + LOOP[:5000], False),
        (LOOP[:10_000], False),
        (LOOP[:10_001], True),
        ("", False),
        ("\U0001f914 " * 6000, True),
    ],
    ids=["loop", "noise", "ends so", "began so", "half", "short", "long enough", "empty", "wide"],
)
def test_a_long_text_loops_whose_end_compresses_tenfold(text, loops):
    assert is_loop(text) is loops


def test_the_bound_is_ten_times_shorter_and_not_more():
    end = LOOP[-10_000:]
    sizes = [len(zlib.compress((NOISE[:size] + end[size:]).encode())) for size in (500, 1500)]
    assert sizes[0] < 1000 < sizes[1]
    assert [is_loop("x" + NOISE[:size] + end[size:]) for size in (500, 1500)] == [True, False]


def test_the_share_of_rollouts_that_loop_is_of_all_of_them():
    accelerator = SimpleNamespace(reduce=lambda sums, reduction: sums, device="cpu")
    counts = count_rollouts([[1]] * 4, [LOOP, NOISE, "short", LOOP])
    metrics = measure_rollouts(counts, [False] * 4, 0, accelerator)
    assert metrics["completions/looping_ratio"] == 0.5


def clip_warnings(logs, **state):
    """What is told of one log, by a run of the paper's clip."""
    state = SimpleNamespace(**{"is_world_process_zero": True, **state})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ClipWarning().on_log(SimpleNamespace(clip="upper", clip_value=0.05), state, TrainerControl(), logs=logs)
    return [str(warning.message) for warning in caught]


def test_a_clip_that_turns_the_gradient_is_told_with_the_figure_and_what_to_set():
    (text,) = clip_warnings({"clip_gradient_agreement": -0.18, "num_tokens": 1500})
    for part in ("clip='upper'", "clip_value=0.05", "-0.18", "clip=None", "none"):
        assert part in text


@pytest.mark.parametrize(
    ("logs", "state"),
    [
        ({"clip_gradient_agreement": LEAST_CLIP_AGREEMENT, "num_tokens": 1500}, {}),
        ({"clip_gradient_agreement": -0.18, "num_tokens": 900}, {}),  # noise
        ({"clip_gradient_agreement": -0.18, "num_tokens": 1500}, {"is_world_process_zero": False}),
        ({"divergence": 0.1, "num_tokens": 3000}, {}),  # a later step
        (None, {}),
    ],
)
def test_otherwise_nothing_is_told_of_the_clip(logs, state):
    assert clip_warnings(logs, **state) == []


def teacher_warnings(logs, earlier=(), is_main=True):
    """What is said of the last of `logs`, which stands in the history as the trainer puts it there."""
    state = SimpleNamespace(log_history=[*earlier, logs], is_world_process_zero=is_main)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TeacherWarning().on_log(None, state, TrainerControl(), logs=logs)
    return [str(warning.message) for warning in caught]


def test_a_teacher_that_is_less_sure_than_the_student_at_the_start_is_told_with_the_figure():
    (text,) = teacher_warnings({"entropy_gap": -0.07, "num_tokens": 1900}, earlier=[{"loss": 1.0}])
    for part in ("entropy_gap -0.07", "teacher_prompt_template", "teacher_chat_template_kwargs", "guard='off'"):
        assert part in text


@pytest.mark.parametrize(
    ("logs", "others"),
    [
        ({"entropy_gap": LEAST_ENTROPY_GAP, "num_tokens": 1900}, {}),
        ({"entropy_gap": -0.07, "num_tokens": 900}, {}),  # noise
        ({"entropy_gap": -0.07, "num_tokens": 1900}, {"earlier": [{"entropy_gap": 0.1, "num_tokens": 950}]}),
        ({"entropy_gap": -0.07, "num_tokens": 1900}, {"is_main": False}),
        ({"loss": 0.1}, {}),
    ],
)
def test_otherwise_nothing_is_told_of_the_teacher(logs, others):
    assert teacher_warnings(logs, **others) == []


RIGHT = "rewards/accuracy_reward/mean"


def answer_warnings(logs, earlier=(), is_main=True):
    """As `teacher_warnings`, of the share of right rollouts."""
    state = SimpleNamespace(log_history=[*earlier, logs], is_world_process_zero=is_main)
    args = SimpleNamespace(chat_template_kwargs={"enable_thinking": False})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AnswerWarning().on_log(args, state, TrainerControl(), logs=logs)
    return [str(warning.message) for warning in caught]


def test_a_start_without_right_rollouts_is_told_with_the_thinking_mode():
    (text,) = answer_warnings({RIGHT: 0.0156, "num_tokens": 1900}, earlier=[{"loss": 1.0}])
    for part in ("0.0156", "--thinking on and off", "{'enable_thinking': False}", "guard='off'"):
        assert part in text


@pytest.mark.parametrize(
    ("logs", "others"),
    [
        ({RIGHT: 0.03, "num_tokens": 1900}, {}),
        ({RIGHT: float("nan"), "num_tokens": 1900}, {}),
        ({RIGHT: 0.0, "num_tokens": 900}, {}),  # noise
        ({RIGHT: 0.0, "num_tokens": 1900}, {"earlier": [{RIGHT: 0.3, "num_tokens": 950}]}),
        ({RIGHT: 0.0, "num_tokens": 1900}, {"is_main": False}),
        ({"rewards/own/mean": 0.0, "num_tokens": 1900}, {}),
    ],
)
def test_otherwise_nothing_is_told_of_the_answers(logs, others):
    assert answer_warnings(logs, **others) == []


def test_the_reward_that_is_watched_is_the_one_that_runs_log(make_model, make_args, dataset, tokenizer):
    trainer = OPSDTrainer(make_model(), args=make_args(), train_dataset=dataset, processing_class=tokenizer)
    assert any(isinstance(callback, AnswerWarning) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert any(RIGHT in log for log in trainer.state.log_history)


@pytest.mark.parametrize(
    ("trainer_class", "guard", "watched"),
    [(OPSDTrainer, "warn", True), (OPSDTrainer, "off", False), (OGLSSDTrainer, "warn", False)],
)
def test_the_teacher_is_watched_where_it_reads_the_reference_and_a_guard_is_on(
    make_model, make_args, dataset, tokenizer, trainer_class, guard, watched
):
    args = make_args(trainer_class.config_class, guard=guard, num_generations=4)
    trainer = trainer_class(make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
    assert any(isinstance(callback, TeacherWarning) for callback in trainer.callback_handler.callbacks) is watched


@pytest.mark.parametrize(("clip", "expected"), [("upper", {1}), ("token", {1}), (None, set())])
def test_the_clips_agreement_is_measured_at_the_first_step_alone(
    make_model, make_args, dataset, tokenizer, monkeypatch, clip, expected
):
    args = make_args(clip=clip, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer = OPSDTrainer(make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    logged = {log["step"] for log in trainer.state.log_history if "clip_gradient_agreement" in log}
    assert logged == expected


def test_the_clip_is_judged_at_the_strength_that_a_growing_target_ends_with(make_model, make_args, dataset, tokenizer):
    def first(steering_warmup_steps):
        settings = {"num_generations": 4, "max_completion_length": 8, "distillation_length": 8, "max_steps": 2}
        args = make_args(OGLSSDTrainer.config_class, **settings, steering_warmup_steps=steering_warmup_steps)
        trainer = OGLSSDTrainer(make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        return trainer.state.log_history[0]["clip_gradient_agreement"]

    assert first(2) == pytest.approx(first(0), abs=1e-6)


def test_the_papers_clip_is_told_on_the_embedded_model(tmp_path):
    trainer, told = run_demo(tmp_path, "--clip", "upper", "--clip_value", "0.05", "--max_steps", "1", start="clip=")
    assert len(told) == 1
    assert -0.5 < trainer.state.log_history[0]["clip_gradient_agreement"] < 0


def run_demo(tmp_path, *overrides, start="Collapse guard"):
    """The embedded model's recipe, logging every step; the trainer and the warnings that begin with `start`."""
    from trl_opsd.commands.train import main
    from trl_opsd.demo import build_rows, model_path

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in build_rows("train", 1024)))
    words = ["--config", str(files("trl_opsd.demo") / "opsd.yaml"), "--dataset_name", str(rows), "--use_cpu", "true"]
    words += ["--model_name_or_path", model_path(), "--output_dir", str(tmp_path / "run"), "--logging_steps", "1"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = main("opsd", [*words, "--disable_tqdm", "true", *overrides])
    texts = [str(warning.message) for warning in caught]
    return trainer, [text for text in texts if text.startswith(start)]


@pytest.mark.slow
def test_it_is_silent_on_the_demos_recipe(tmp_path):
    guards = ("Collapse guard", "Accuracy guard", "clip=")
    # A step more than the recipe's 15, for 1,024 rollouts: enough for both. By step 20 no slip is left to be noticed.
    trainer, told = run_demo(tmp_path, "--max_steps", "16", start=guards)
    assert told == [] and trainer.state.global_step == 16


@pytest.mark.slow
def test_it_stops_a_run_whose_learning_rate_is_far_too_high(tmp_path):
    rate = ["--learning_rate", "3e-2", "--warmup_steps", "0"]
    trainer, told = run_demo(tmp_path, *rate, "--max_steps", "20", "--guard", "stop")
    assert told and "unclipped divergence" in told[0]
    assert trainer.state.global_step < 8
    assert trainer.state.log_history[-1]["step"] == trainer.state.global_step
