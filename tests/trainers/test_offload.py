# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a large generation batch wait in host memory, and nothing else changes."""

import pytest
import torch
from fake_cuda import fake_cuda
from groups import GROUPS
from jobs import job

import trl_opsd.trainers.micro_batch
from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.losses import LinearShape
from trl_opsd.teacher import states
from trl_opsd.teacher.states import TargetStates, offload_states, read_target

METHODS = [
    (OPSDTrainer, {}),
    (OGLSSDTrainer, {**GROUPS, "distillation_length": 5}),
    (PurifiedOPSDTrainer, {"decomposition_steps": 1}),
]


@pytest.mark.parametrize("trainer_class, settings", METHODS)
def test_it_changes_no_number(build, dataset, monkeypatch, trainer_class, settings):
    histories, moved = [], []
    offload = trl_opsd.trainers.micro_batch.offload_states

    def watched(*arguments):
        moved.append(bool(taken := offload(*arguments)))
        return taken

    monkeypatch.setattr(trl_opsd.trainers.micro_batch, "offload_states", watched)
    for offloaded in (False, True):
        monkeypatch.setattr(states, "DEVICE_BYTES", 0 if offloaded else 2**30)
        trainer = build(
            trainer_class=trainer_class,
            gradient_accumulation_steps=2,
            max_steps=2,
            **settings,
        )
        torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
        trainer.train()
        times = ("time/", "step_time", "train_", "epoch")
        histories.append(
            [{k: v for k, v in entry.items() if not k.startswith(times)} for entry in trainer.state.log_history]
        )
    assert len(histories[0]) == 3 and histories[0] == histories[1]
    assert moved == [False] * (len(moved) // 2) + [True] * (len(moved) // 2)


def test_a_gpus_states_go_to_the_host_and_back_to_the_loss(monkeypatch):
    monkeypatch.setattr(states, "DEVICE_BYTES", 0)
    jobs = [job(2, 3, row=0), job(2, 3, row=1, direction=0.5), job(2, 3, row=1, anchor=0.0, direction=-0.5)]
    with fake_cuda():
        target = TargetStates(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
        for scored in jobs:
            target.add(scored, torch.empty(3, 8, device="cuda"))
        batch = target.columns()
        assert {tensor.device.type for tensor in batch.values()} == {"cpu"}
        batch |= offload_states(batch, 1)
        target = read_target(batch, LinearShape(1.0), None, torch.device("cuda"))
        assert {tensor.device.type for tensor in (target.anchor, target.direction)} == {"cuda"}


def test_only_more_than_a_device_should_hold_moves_and_also_what_was_read_from_a_checkpoint(monkeypatch):
    with fake_cuda():
        batch = {"anchor_hidden": torch.empty(2, 3, 4, device="cuda"), "other": torch.empty(2, device="cuda")}
        size = 2 * 3 * 4 * 4
        monkeypatch.setattr(states, "DEVICE_BYTES", 5 * size)
        assert offload_states(batch, 5) == {}
        moved = offload_states(batch, 6)
    assert {name: tensor.device.type for name, tensor in moved.items()} == {"anchor_hidden": "cpu"}


@pytest.mark.parametrize("trainer_class, num_states", [(OPSDTrainer, 1), (PurifiedOPSDTrainer, 2)])
def test_where_the_teacher_puts_them_follows_from_the_whole_generation_batch(
    build, monkeypatch, trainer_class, num_states
):
    trainer = build(trainer_class=trainer_class)
    size = (
        4
        * 8
        * trainer.scorer.hidden_size
        * num_states
        * torch.promote_types(trainer.model.dtype, torch.float32).itemsize
    )
    monkeypatch.setattr(states, "DEVICE_BYTES", size)
    assert not trainer.targets._wait_on_host(4, 8) and trainer.targets._wait_on_host(4, 9)
