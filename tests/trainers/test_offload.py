# SPDX-License-Identifier: Apache-2.0
"""`offload_targets`: hidden states wait in host memory, and nothing else changes."""

import pytest
import torch
from fake_cuda import fake_cuda
from groups import GROUPS
from jobs import job
from steps import loss_of_rows

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.losses import LinearShape
from trl_opsd.teacher.states import TargetStates, offload_states, read_target

METHODS = [(OPSDTrainer, {}), (OGLSSDTrainer, {**GROUPS, "distillation_length": 5}), (PurifiedOPSDTrainer, {})]


@pytest.mark.parametrize("trainer_class, settings", METHODS)
def test_it_changes_no_number(build, dataset, trainer_class, settings):
    histories = []
    for offloaded in (False, True):
        trainer = build(
            trainer_class=trainer_class,
            offload_targets=offloaded,
            gradient_accumulation_steps=2,
            max_steps=2,
            decomposition_steps=1,
            **settings,
        )
        torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
        trainer.train()
        times = ("time/", "step_time", "train_", "epoch")
        histories.append(
            [{k: v for k, v in entry.items() if not k.startswith(times)} for entry in trainer.state.log_history]
        )
    assert len(histories[0]) == 3 and "decomposition/total_norm" in histories[0][0]
    assert histories[0] == histories[1]


def test_a_gpus_states_go_to_the_host_and_back_to_the_loss():
    jobs = [job(2, 3, row=0), job(2, 3, row=1, direction=0.5), job(2, 3, row=1, anchor=0.0, direction=-0.5)]
    with fake_cuda():
        target = TargetStates(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
        for scored in jobs:
            target.add(scored, torch.empty(3, 8, device="cuda"))
        batch = target.columns()
        assert {tensor.device.type for tensor in batch.values()} == {"cpu"}
        batch |= offload_states(batch)
        target = read_target(batch, LinearShape(1.0), None, torch.device("cuda"))
        assert {tensor.device.type for tensor in (target.anchor, target.direction)} == {"cuda"}


def test_a_batch_that_was_not_offloaded_is(build, dataset):
    """As of a checkpoint, whose tensors are read to the GPU."""
    trainer = build(offload_targets=True)
    with fake_cuda():
        batch = {"anchor_hidden": torch.empty(2, 3, 4, device="cuda"), "other": torch.empty(2, device="cuda")}
        assert {name: tensor.device.type for name, tensor in offload_states(batch).items()} == {"anchor_hidden": "cpu"}
    _, batch = loss_of_rows(trainer, dataset.select(range(4)))
    assert torch.equal(trainer.prepare_micro_batch(batch)["anchor_hidden"], batch["anchor_hidden"])
