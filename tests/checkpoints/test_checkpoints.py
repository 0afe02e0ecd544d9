# SPDX-License-Identifier: Apache-2.0
"""A damaged checkpoint is refused by the file's name, runs in one folder are told apart, and one trains at a time."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from peft import LoraConfig

from trl_opsd import OPSDTrainer
from trl_opsd.checkpoints import lock as run_lock
from trl_opsd.checkpoints.initial_weights import hash_initial_weights
from trl_opsd.checkpoints.lock import only_run_in
from trl_opsd.checkpoints.manifest import (
    MARKER,
    complete_steps,
    find_faults,
    read_checkpoint,
    remove_older,
    writing_checkpoint,
)
from trl_opsd.checkpoints.resumption import CheckpointSearch

FILES = (
    "model.safetensors",
    "teacher.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "trl_opsd_state-00000-of-00001.json",
    "trl_opsd_batch-00000-of-00001.safetensors",
    "trl_opsd_head.safetensors",
)


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, tmp_path):
    """A trainer that saves every step and generates a batch for every second."""

    def build(model=None, lora=None, output_dir="run", **settings):
        defaults = {
            "output_dir": str(tmp_path / output_dir),
            "max_steps": 3,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        }
        return OPSDTrainer(
            model=model or make_model(),
            args=make_args(**defaults | settings),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
            peft_config=lora,
        )

    return build


def trained(build, **settings):
    trainer = build(**settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run(build, kept, tmp_path):
    """A copy of a run with an average as its teacher, trained once: steps 1 and 3 are in the middle of a batch."""
    if not kept.exists():
        trained(build, teacher_model_kind="ema")
        (tmp_path / "run").rename(kept)
    return shutil.copytree(kept, tmp_path / "run")


def delete(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    """Change one bit of the byte in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_the_marker_lists_every_file_with_size_and_hash(run):
    listed = read_checkpoint(run / "checkpoint-3").files
    assert set(FILES) < set(listed)
    assert set(listed) == {path.name for path in (run / "checkpoint-3").iterdir()} - {MARKER, "README.md"}
    assert all(size == (run / "checkpoint-3" / name).stat().st_size for name, (size, _) in listed.items())
    assert all(len(digest) == 64 for _, digest in listed.values())


@pytest.mark.parametrize("damage", [delete, cut, empty, flip])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name_and_true_falls_back_to_the_newest_whole_checkpoint(run, name, damage):
    path = run / "checkpoint-3" / name
    damage(path)
    with pytest.raises(ValueError) as raised:
        CheckpointSearch().resolve(str(run / "checkpoint-3"), run)
    words = {delete: "is missing", cut: "bytes instead of", empty: "bytes instead of", flip: "was altered"}[damage]
    for text in (f"{path} {words}" if damage in (delete, flip) else str(path), words, f"Give {run / 'checkpoint-2'}"):
        assert text in str(raised.value)
    told = []
    assert CheckpointSearch(tell=told.append).resolve(True, run) == str(run / "checkpoint-2")
    (text,) = told
    assert str(path) in text and "Skipped newer" in text


def test_a_damaged_run_goes_on_from_the_checkpoint_before_as_if_nothing_was(build, run):
    whole = [
        entry["loss"] for entry in json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    ]
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    resumed = build(teacher_model_kind="ema")
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing.*Give .*checkpoint-2"):
        resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    with pytest.warns(UserWarning, match=r"Skipped newer checkpoints for .*checkpoint-2: .*optimizer\.pt is missing"):
        resumed.train(resume_from_checkpoint=True)
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == whole
    assert find_faults(read_checkpoint(run / "checkpoint-3")) == []


def test_two_damaged_checkpoints_are_both_named_and_without_a_whole_one_true_is_refused(run):
    flip(run / "checkpoint-3" / "model.safetensors")
    cut(run / "checkpoint-2" / "optimizer.pt")
    told = []
    assert CheckpointSearch(tell=told.append).resolve(True, run) == str(run / "checkpoint-1")
    assert "checkpoint-3/model.safetensors" in told[0] and "checkpoint-2/optimizer.pt" in told[0]
    delete(run / "checkpoint-1" / "scheduler.pt")
    with pytest.raises(ValueError, match=r"no complete checkpoint .*checkpoint-1/scheduler\.pt is missing"):
        CheckpointSearch().resolve(True, run)


@pytest.mark.parametrize("folder", ["global_step3/zero_pp_rank_0.pt", "pytorch_model_fsdp_0/__0_0.distcp"])
def test_the_folders_of_engines_are_listed_too(tmp_path, folder):
    with writing_checkpoint(tmp_path / "checkpoint-1", marks=True, wait=lambda: None):
        shard = tmp_path / "checkpoint-1" / folder
        shard.parent.mkdir()
        shard.write_bytes(b"shard")
    checkpoint = read_checkpoint(tmp_path / "checkpoint-1")
    assert set(checkpoint.files) == {folder} and not find_faults(checkpoint)
    shard.write_bytes(b"Shard")
    assert str(shard) in find_faults(checkpoint)[0]


def test_cards_and_files_that_others_add_are_no_damage(run):
    (run / "checkpoint-3" / "README.md").write_text("written later")
    (run / "checkpoint-3" / "notes.json").write_text("mine")
    assert CheckpointSearch().resolve(True, run) == str(run / "checkpoint-3")


def test_a_checkpoint_of_the_model_alone_is_listed_and_resumed(build, tmp_path):
    trained(build, max_steps=2, save_only_model=True, steps_per_generation=2)
    assert "optimizer.pt" not in read_checkpoint(tmp_path / "run" / "checkpoint-1").files
    resumed = build(max_steps=2, steps_per_generation=2)
    with pytest.warns(UserWarning, match="saved without its optimizer"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("name", [name for name in FILES if name != "training_args.bin"])
def test_a_cut_file_of_a_checkpoint_without_a_list_is_named(run, name):
    (run / "checkpoint-3" / MARKER).write_text('{"complete": true}')
    told = []
    assert CheckpointSearch(tell=told.append).resolve(str(run / "checkpoint-3"), run)
    assert "without a list of its files" in told[-1] and "another run" not in told[-1]
    cut(run / "checkpoint-3" / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        CheckpointSearch().resolve(str(run / "checkpoint-3"), run)


def test_a_marker_that_cannot_be_read_is_named(run):
    cut(run / "checkpoint-3" / MARKER)
    with pytest.raises(ValueError, match=rf"{MARKER} cannot be read.*Give .*checkpoint-2"):
        CheckpointSearch().resolve(str(run / "checkpoint-3"), run)


def test_a_checkpoint_written_again_keeps_no_file_of_before(tmp_path):
    for name in ("optimizer.pt", "model.safetensors"):
        with writing_checkpoint(tmp_path / "checkpoint-1", marks=True, wait=lambda: None):
            (tmp_path / "checkpoint-1" / name).write_text("x")
    assert set(read_checkpoint(tmp_path / "checkpoint-1").files) == {"model.safetensors"}


# The initial model


def change_one_value(model, name):
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[7] += 1e-3  # between the numbers of a sample of 256
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("without", [False, True], ids=["state", "no state"])
def test_one_changed_value_of_the_base_teacher_is_refused(build, make_model, tmp_path, lora, without):
    adapter = LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
    trained(build, max_steps=1, lora=copy.deepcopy(adapter))
    folder = tmp_path / "run" / "checkpoint-1"
    if without:  # as on another number of ranks
        (folder / "trl_opsd_state-00000-of-00001.json").unlink()
        marker = json.loads((folder / MARKER).read_text())
        del marker["files"]["trl_opsd_state-00000-of-00001.json"]
        (folder / MARKER).write_text(json.dumps(marker))
    name = "model.layers.0.mlp.up_proj.weight"
    assert dict(make_model().named_parameters())[name].numel() > 512
    other = build(model=change_one_value(make_model(), name), lora=copy.deepcopy(adapter))
    with pytest.raises(ValueError, match=r"other weights than the one the run started from.*Give the original model"):
        other.train(resume_from_checkpoint=str(folder))


def test_the_hash_reads_every_value_and_the_sample_some(make_model):
    model = make_model()
    names = {name for name, _ in model.named_parameters()}
    before = hash_initial_weights(model, names)
    after = hash_initial_weights(change_one_value(model, "lm_head.weight"), names)
    assert before["sample"] == after["sample"] and before["sha256"] != after["sha256"]
    assert hash_initial_weights(model, names, counts=False) is None


def test_an_average_is_resumed_with_another_model_at_the_start(build, make_model, run):
    resumed = build(model=make_model(seed=5), teacher_model_kind="ema")
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert resumed.state.global_step == 3


# Two runs in one folder


def test_a_run_has_an_id_that_a_resumed_run_carries_on(build, tmp_path):
    trained(build, max_steps=2)
    run = read_checkpoint(tmp_path / "run" / "checkpoint-1").run
    resumed = build()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run.id == run and len(run) == 32
    assert {read_checkpoint(folder).run for folder in (tmp_path / "run").glob("checkpoint-*")} == {run}
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trl_opsd_state-00000-of-00001.json").read_text())
    assert state["values"]["run_id"] == run
    assert trained(build, output_dir="other", max_steps=1).run.id != run


def test_a_fresh_run_among_another_runs_checkpoints_is_refused(build, run):
    before = complete_steps(run)
    with pytest.raises(ValueError, match=r"checkpoints of another run \(checkpoint-1, checkpoint-2, checkpoint-3\)"):
        build().train()
    assert complete_steps(run) == before
    again = build(max_steps=1)
    again.run.own_ids |= {read_checkpoint(run / "checkpoint-1").run}  # as if it had written them itself
    with pytest.warns(UserWarning, match="checkpoints from before this start"):
        again.train()
    told = []
    assert CheckpointSearch(tell=told.append).resolve(True, run) == str(run / "checkpoint-1")
    assert read_checkpoint(run / "checkpoint-1").run == again.run.id
    assert "checkpoints of another run, which are left alone: checkpoint-2, checkpoint-3" in told[0]
    flip(run / "checkpoint-1" / "model.safetensors")  # never the other's
    with pytest.raises(ValueError, match=r"no complete checkpoint"):
        CheckpointSearch().resolve(True, run)


def test_a_run_that_saves_nothing_or_finds_half_written_folders_alone_starts(build, run):
    trained(build, max_steps=1, save_strategy="no")
    for folder in run.glob("checkpoint-*"):
        (folder / MARKER).write_text('{"complete": false}')
    trained(build, max_steps=1)


def test_the_same_trainer_may_train_again_and_says_what_lies_there(build):
    trainer = trained(build, max_steps=1)
    first = trainer.run.id
    with pytest.warns(UserWarning, match="checkpoints from before this start"):
        trainer.train()
    assert trainer.run.id != first


def make_checkpoints(folder, *runs):
    for step, run in enumerate(runs, start=1):
        with writing_checkpoint(folder / f"checkpoint-{step}", marks=True, wait=lambda: None, run=run):
            pass


def test_the_limit_removes_no_checkpoint_of_another_run(tmp_path):
    make_checkpoints(tmp_path, "a", "b", "b", "b", "a")
    remove_older(tmp_path, 2, "b", best=None)
    assert set(complete_steps(tmp_path)) == {1, 3, 4, 5}
    remove_older(tmp_path, 1, "b", best=str(tmp_path / "checkpoint-3"))
    assert set(complete_steps(tmp_path)) == {1, 3, 4, 5}
    remove_older(tmp_path, None, "b", best=None)
    assert set(complete_steps(tmp_path)) == {1, 3, 4, 5}


def test_the_last_written_is_the_newest_also_at_an_earlier_step(tmp_path):
    make_checkpoints(tmp_path, "a", "a", "a")
    with writing_checkpoint(tmp_path / "checkpoint-2", marks=True, wait=lambda: None, run="a"):
        pass
    assert CheckpointSearch().resolve(True, tmp_path) == str(tmp_path / "checkpoint-2")


# Two runs at a time


def lock_of(folder):
    return folder / run_lock.FILE


def leave_lock(folder, **changes):
    folder.mkdir(exist_ok=True)
    lock_of(folder).write_text(json.dumps({**run_lock._owner(), **changes}))


SLEEPER = "import sys, time; from trl_opsd.checkpoints.lock import only_run_in\nwith only_run_in(sys.argv[1]):\n    print('in', flush=True); time.sleep(600)"


@pytest.fixture
def other_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        yield process
        process.kill()


def test_a_second_live_run_in_a_folder_is_refused_by_name_and_a_killed_one_is_not_in_the_way(
    build, other_process, tmp_path
):
    trainer = build(max_steps=1)
    with pytest.raises(ValueError, match=rf"another run is training .*process {other_process.pid} on .*delete .*lock"):
        trainer.train()
    assert not complete_steps(tmp_path / "run")
    other_process.kill()  # not waited for: a zombie is no run
    while psutil.Process(other_process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    trainer.train()
    assert complete_steps(tmp_path / "run") == {1: "complete"} and not lock_of(tmp_path / "run").exists()


def test_the_lock_is_there_while_training_and_gone_after_an_error_or_an_interruption(build, tmp_path, monkeypatch):
    trainer = build(save_strategy="no", max_steps=1)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*args, error=error, **kwargs):
            assert lock_of(tmp_path / "run").exists()
            raise error

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(trainer, "training_step", fail)
            trainer.train()
        assert not lock_of(tmp_path / "run").exists()
    trainer.train()


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": 0.0}], ids=["gone", "number of a later process"])
def test_a_lock_whose_process_is_gone_is_cleared_in_silence(tmp_path, changes):
    leave_lock(tmp_path, **changes)
    with only_run_in(tmp_path, tell=pytest.fail):
        assert json.loads(lock_of(tmp_path).read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_holds_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_SECONDS_TO_WATCH", 0.5)
    leave_lock(tmp_path, host="elsewhere")
    sleep = time.sleep
    with monkeypatch.context() as patch:
        patch.setattr(run_lock.time, "sleep", lambda seconds: (sleep(seconds), os.utime(lock_of(tmp_path))))
        with pytest.raises(ValueError, match="on elsewhere"), only_run_in(tmp_path):
            pass
    told = []
    with only_run_in(tmp_path, tell=told.append):
        assert json.loads(lock_of(tmp_path).read_text())["host"] != "elsewhere"
    assert "elsewhere" in told[0] and "takes over" in told[0]


def test_the_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_TOUCHES", 0.01)
    with only_run_in(tmp_path):
        os.utime(lock_of(tmp_path), (0, 0))
        end = time.monotonic() + 10
        while lock_of(tmp_path).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert lock_of(tmp_path).stat().st_mtime > 0


def test_every_rank_refuses_what_the_first_one_found(tmp_path):
    refusal = "output_dir is taken"
    with (
        pytest.raises(ValueError, match=refusal),
        only_run_in(tmp_path, takes=False, of_all=lambda value: [refusal, value]),
    ):
        pass
    assert not lock_of(tmp_path).exists()
