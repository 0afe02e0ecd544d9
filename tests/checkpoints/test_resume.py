# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed is the run that was not interrupted, bit by bit, wherever it stopped."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_opsd import (
    AntiSDTrainer,
    DemoPSDTrainer,
    EGRSDTrainer,
    OGLSSDTrainer,
    OPSDTrainer,
    PBSDTrainer,
    RCSDTrainer,
    SDFTTrainer,
    SDPOTrainer,
    SGSDTrainer,
    SORTTrainer,
)
from trl_opsd._trl import rollouts
from trl_opsd.checkpoints.manifest import (
    MARKER,
    checkpoint_state,
    complete_steps,
    latest_complete_checkpoint,
    writing_checkpoint,
)
from trl_opsd.checkpoints.resumption import CheckpointSearch

STEPS = 6
TIMES = ("time/", "step_time", "train_runtime", "per_second", "train_loss", "total_flos")


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, tmp_path):
    """A trainer that samples its rollouts, saves every step and generates a batch for every second."""

    def build(trainer_class=OPSDTrainer, lora=False, seed=0, model=None, train_dataset=dataset, **settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "teacher_update_rate": 0.3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        }
        return trainer_class(
            model=model or make_model(seed=seed, attention_dropout=0.1),
            args=make_args(trainer_class.config_class, **defaults | settings),
            train_dataset=train_dataset,
            processing_class=copy.deepcopy(tokenizer),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if lora else None,
            reward_funcs=lambda completions, **columns: [float(len(c[0]["content"]) % 2) for c in completions],
        )

    return build


def curve(trainer):
    """Everything that was logged but times."""
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in trainer.state.log_history
    ]


def check_every_resume(build, tmp_path, steps=range(1, STEPS), **settings):
    """Train once, then from each of its checkpoints; logs, weights and the teacher's values are the same."""
    whole = build(**settings)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    wanted = curve(whole)
    assert len(wanted) >= 2 and any(not torch.equal(v, start[n]) for n, v in whole.model.state_dict().items())
    for step in steps:
        torch.manual_seed(99)
        resumed = build(**settings, output_dir=str(tmp_path / "again"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert curve(resumed) == wanted, step
        for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), (step, name)
        for name, value in whole.teacher.values.items():
            assert torch.equal(value, resumed.teacher.values[name]), (step, name)
        assert resumed.memory == whole.memory, step


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_resumed_from_any_step_is_the_uninterrupted_one(build, tmp_path, kind, lora):
    check_every_resume(build, tmp_path, teacher_model_kind=kind, lora=lora)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        # The logged means span a checkpoint.
        ({"logging_steps": 4}, (1, 3, 5)),
        # A batch is used twice, so the first half of it is still needed in the middle.
        ({"num_iterations": 2}, (1, 2, 3)),
        (
            {
                "trainer_class": OGLSSDTrainer,
                "num_generations": 2,
                "distillation_length": None,
                "steering_warmup_steps": 5,
            },
            (1, 4),
        ),
        ({"reward_weight": 0.5, "num_generations": 2}, (1, 2)),
        ({"trainer_class": SDFTTrainer, "teacher_sync_steps": 2, "num_loss_tokens_to_skip": 0}, (1, 2)),
        ({"trainer_class": DemoPSDTrainer, "num_generations": 4, "max_completion_length": 8}, (1, 2, 3)),
        (
            {
                "trainer_class": AntiSDTrainer,
                "num_generations": 2,
                "max_completion_length": 8,
                "gate_warmup_batches": 1,
                "gate_closes_below": 0.0,
            },
            (1, 3, 4, 5),
        ),
        ({"trainer_class": EGRSDTrainer, "max_completion_length": 8}, (1, 3, 4)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_keep_more_between_steps_resume_exactly_too(build, tmp_path, settings, steps):
    check_every_resume(build, tmp_path, steps=steps, **settings)


def test_rows_that_were_put_in_order_by_length_are_resumed_in_that_order(build, tmp_path, monkeypatch):
    moved, arrange = [], OPSDTrainer.arrange_rows

    def watched(trainer, batches):
        arranged = arrange(trainer, batches)
        pairs = zip(batches, arranged, strict=True)
        moved.append(any(not torch.equal(one["rollout_index"], two["rollout_index"]) for one, two in pairs))
        return arranged

    monkeypatch.setattr(OPSDTrainer, "arrange_rows", watched)
    settings = {"per_device_train_batch_size": 2, "max_completion_length": 40, "num_iterations": 2}
    check_every_resume(build, tmp_path, steps=(1, 2, 3), **settings)
    assert any(moved)


def test_a_streamed_dataset_resumes_where_it_stopped(build, tmp_path, dataset):
    check_every_resume(build, tmp_path, steps=(1, 2), max_steps=4, train_dataset=dataset.to_iterable_dataset())


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer_class": SGSDTrainer},
        {"trainer_class": PBSDTrainer},
        {"trainer_class": RCSDTrainer},
        {"trainer_class": SDPOTrainer, "num_generations": 2},
        {
            "trainer_class": SDPOTrainer,
            "num_generations": 2,
            "lora": True,
            "teacher_model_kind": "base",
            "live_share": 0.4,
        },
        {"trainer_class": SORTTrainer, "num_generations": 2, "learning_rate": 1e-2},
    ],
    ids=("several views", "pairs", "written texts", "a moving average of peers", "mixed weights", "references"),
)
def test_methods_that_write_or_mix_resume_exactly_too(build, tmp_path, dataset, settings):
    columns = [{"skills": ["add", "carry"][: index % 3], "rubric": ["adds"], "plan": "add"} for index in range(8)]
    rows = Dataset.from_list([{**row, **own} for row, own in zip(dataset, columns, strict=True)])
    settings = {"max_completion_length": 8, **settings}
    check_every_resume(build, tmp_path, steps=(1, 2), max_steps=4, train_dataset=rows, **settings)


def trained(build, **settings):
    trainer = build(**settings)
    trainer.train()
    return trainer


def files_of(folder):
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_between_two_batches_holds_no_batch_and_one_within_holds_the_rest_alone(build, tmp_path):
    trainer = trained(build, max_steps=2, num_generations=1, max_completion_length=4)
    within, between = tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2"
    state, batch, head = (
        "trl_opsd_state-00000-of-00001.json",
        "trl_opsd_batch-00000-of-00001.safetensors",
        "trl_opsd_head.safetensors",
    )
    assert {state, batch, head, MARKER} <= files_of(within)
    assert {state, MARKER} <= files_of(between) and not {batch, head} & files_of(between)
    from safetensors.torch import load_file

    tensors = load_file(within / batch)
    assert {key.split("/")[0] for key in tensors} == {"2", "3"}  # of four micro-batches two are done
    hidden = tensors["2/anchor_hidden"]
    assert hidden.dtype == torch.float32 and hidden.shape[0] == 1 and hidden.shape[2] == trainer.scorer.hidden_size


def without_our_state(folder):
    for path in folder.glob("trl_opsd_*"):
        path.unlink()


def test_a_checkpoint_of_an_older_run_is_taken_and_said_to_be_inexact_in_the_middle_of_a_batch(build, tmp_path):
    whole = trained(build, max_steps=4)
    for step in (1, 2):
        without_our_state(tmp_path / "run" / f"checkpoint-{step}")
    between = build(max_steps=4)
    with pytest.warns(UserWarning, match="without trl_opsd's marker"):
        between.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [entry["loss"] for entry in curve(between)[:4]] == [entry["loss"] for entry in curve(whole)[:4]]
    within = build(max_steps=4)
    with (
        pytest.warns(UserWarning, match="without trl_opsd's marker"),
        pytest.warns(UserWarning, match=r"middle of a generation batch.*sampled anew"),
    ):
        within.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert within.state.global_step == 4


def test_other_batch_settings_than_the_checkpoints_are_said_to_be_inexact(build, tmp_path):
    trained(build, max_steps=1)
    other = build(max_steps=2, steps_per_generation=8)
    with pytest.warns(UserWarning, match=r"steps_per_generation.*sampled anew"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert other.state.global_step == 2


def test_a_pending_batch_of_another_layout_is_sampled_anew_and_said_to_be(build, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "PENDING_LAYOUT", rollouts.PENDING_LAYOUT - 1)
    trained(build, max_steps=1)
    monkeypatch.undo()
    other = build(max_steps=2)
    with pytest.warns(UserWarning, match=r"this version of trl_opsd.*sampled anew"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert other.state.global_step == 2


def half_write(folder):
    """What a kill leaves: the parent's files may be there, the marker says it was not the end."""
    (folder / MARKER).write_text(json.dumps({"complete": False}))


def test_the_newest_complete_checkpoint_is_taken_and_newer_half_written_ones_are_named(build, tmp_path):
    trained(build, max_steps=3)
    run = tmp_path / "run"
    half_write(run / "checkpoint-3")
    (run / "checkpoint-7").mkdir()  # killed before the first file
    resumed = build(max_steps=3, save_strategy="no")
    with pytest.warns(UserWarning, match=r"run ended while.*checkpoint-3, .*checkpoint-7"):
        resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history[:3]] == [1, 2, 3]
    assert latest_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_a_half_written_checkpoint_given_by_name_is_refused_with_one_to_take(build, tmp_path):
    trained(build, max_steps=2)
    half_write(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 is half-written.*Give .*checkpoint-1, the newest complete"):
        build().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_without_a_complete_checkpoint_true_is_refused_with_what_to_do(build, tmp_path):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    with (
        pytest.warns(UserWarning, match="checkpoint-1"),
        pytest.raises(ValueError, match=r"no complete checkpoint\. Leave it out"),
    ):
        build().train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_marker_is_taken_if_its_last_file_is_there(tmp_path):
    for step, name in ((1, "trainer_state.json"), (2, "model.safetensors")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / name).write_text("{}")
    told = []
    assert CheckpointSearch(tell=told.append).resolve(True, tmp_path) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2" in told[0] and "without trl_opsd's marker" in told[1]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, None), (False, None), ("false", None), ("True", "checkpoint-10"), ("true", "checkpoint-10")],
)
def test_what_a_command_line_gives_is_read_and_ten_comes_after_nine(tmp_path, given, wanted):
    for step in (9, 10):
        with writing_checkpoint(tmp_path / f"checkpoint-{step}", marks=True, wait=lambda: None):
            pass
    (tmp_path / "checkpoint-best").mkdir()
    assert CheckpointSearch().resolve(given, tmp_path) == (wanted and str(tmp_path / wanted))


def test_ranks_take_the_newest_step_that_all_of_them_have(tmp_path):
    for step in (1, 2):
        with writing_checkpoint(tmp_path / f"checkpoint-{step}", marks=True, wait=lambda: None):
            pass
    other = {"checkpoint-1"}
    search = CheckpointSearch(of_all=lambda value: [value, other if isinstance(value, set) else value])
    assert search.resolve(True, tmp_path) == str(tmp_path / "checkpoint-1")


def test_with_a_limit_of_one_the_old_checkpoint_stays_until_the_new_one_is_complete(build, tmp_path, monkeypatch):
    seen = []
    trainer = build(max_steps=3, save_total_limit=1)
    save = trainer.save_extra_state

    def look(folder):
        seen.append({path.name: checkpoint_state(path) for path in (tmp_path / "run").glob("checkpoint-*")})
        save(folder)

    monkeypatch.setattr(trainer, "save_extra_state", look)
    trainer.train()
    half, whole = "half-written", "complete"
    assert seen[1:] == [
        {"checkpoint-1": whole, "checkpoint-2": half},
        {"checkpoint-2": whole, "checkpoint-3": half},
    ]
    assert complete_steps(tmp_path / "run") == {3: whole} and trainer.args.save_total_limit == 1


def test_the_settings_saved_with_a_checkpoint_hold_the_limit_as_it_was_given(build, tmp_path):
    trained(build, max_steps=1, save_total_limit=2)
    saved = torch.load(tmp_path / "run" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2 and type(saved.save_total_limit) is int


def test_a_checkpoint_is_pushed_when_it_is_complete(build, tmp_path, monkeypatch):
    pushed = []
    push = "transformers.Trainer._push_from_checkpoint"
    monkeypatch.setattr(
        push, lambda self, checkpoint_folder: pushed.append((checkpoint_folder, checkpoint_state(checkpoint_folder)))
    )
    trainer = build(max_steps=1)
    trainer.args.push_to_hub = True
    trainer.hub_model_id = "someone/model"
    trainer.train()
    assert pushed == [(str(tmp_path / "run" / "checkpoint-1"), "complete")]


def test_a_checkpoint_written_again_counts_as_half_written_until_its_end(tmp_path):
    folder, states = tmp_path / "checkpoint-1", []
    for _ in range(2):
        with writing_checkpoint(folder, marks=True, wait=lambda: None):
            states.append((checkpoint_state(folder), files_of(folder)))
            (folder / "trl_opsd_batch-00001-of-00002.safetensors").write_text("old")
    assert states == [("half-written", {MARKER})] * 2 and checkpoint_state(folder) == "complete"


def test_the_base_teacher_stays_the_initial_model_and_another_one_is_refused(build, tmp_path, make_model):
    whole = build(max_steps=2)
    initial = {name: value.clone() for name, value in whole.teacher.values.items()}
    whole.train()
    resumed = build(max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(value, initial[name]) for name, value in resumed.teacher.values.items())
    assert any(not torch.equal(value, initial[name]) for name, value in resumed.model.named_parameters())
    other = build(max_steps=2, model=copy.deepcopy(whole.model))
    with pytest.raises(ValueError, match=r"other weights than the one the run started from.*Give the original model"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
