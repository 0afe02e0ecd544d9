# SPDX-License-Identifier: Apache-2.0
"""Trackers without a network: what a step logs is read back with the tracker's own reader."""

import json
import os
from pathlib import Path

import pytest

from trl_opsd.commands.train import main
from trl_opsd.demo import build
from trl_opsd.demo.task import build_rows


def trained(folder, tracker):
    """The numbers of each of two steps as `log.jsonl` has them, after a run of the command line with a tracker."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_rows("train", 20)))
    words = f"--model_name_or_path {Path(build.__file__).parent / 'model'} --dataset_name {folder}/train.jsonl --use_cpu true"
    words += f" --output_dir {folder}/run --bf16 false --max_steps 2 --logging_steps 1 --per_device_train_batch_size 2"
    words += f" --gradient_accumulation_steps 1 --max_completion_length 8 --report_to {tracker} --save_strategy no"
    main("opsd", words.split())
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_tensorboard_has_every_number_of_every_step(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: `pip install tensorboard`")
    pytest.importorskip(
        "torch.utils.tensorboard", reason="tensorboard lacks what it imports: `pip install tensorboard`"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = trained(tmp_path, "tensorboard")
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    for name in steps[0].keys() - {"step"}:
        read = {event.step: event.value for event in reader.Scalars(f"train/{name}")}
        assert read == {line["step"]: pytest.approx(line[name], rel=1e-5) for line in steps if name in line}, name
    assert {"train/divergence", "train/reward", "train/num_tokens"} <= set(reader.Tags()["scalars"])


def test_wandb_writes_an_offline_run_and_needs_no_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: `pip install wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    steps = trained(tmp_path, "wandb")
    assert len(steps) == 2
    (record,) = tmp_path.rglob("run-*.wandb")
    assert os.path.getsize(record) > 0
