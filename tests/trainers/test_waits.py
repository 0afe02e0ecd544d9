# SPDX-License-Identifier: Apache-2.0
"""A GPU runs ahead of Python until a number is asked for: no micro-batch may ask for one."""

import traceback

import pytest
import torch
from groups import GROUPS
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer

# Operations whose result's shape or value Python has to know; indexing by a mask is another.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class Waits(TorchDispatchMode):
    """Within the context, `places` gets the innermost function outside torch of every operation that waits."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in WAITING or by_mask:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.places.append(f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "trainer_class, settings",
    [
        (OPSDTrainer, {}),
        (OPSDTrainer, {"loss_reduction": "sequence", "num_loss_tokens_to_skip": 1}),
        (OGLSSDTrainer, {**GROUPS, "distillation_length": 3}),
        (PurifiedOPSDTrainer, {}),
    ],
)
def test_a_micro_batch_waits_for_no_number(build, trainer_class, settings):
    trainer = build(trainer_class=trainer_class, gradient_accumulation_steps=2, max_steps=2, **settings)
    training_step, micro_batches, between = trainer.training_step, [], Waits()

    def recorded(*args, **kwargs):
        with Waits() as waits:
            loss = training_step(*args, **kwargs)
        micro_batches.append([place for place in waits.places if not place.startswith("masking_utils.py")])
        return loss

    trainer.training_step = recorded
    with between:
        trainer.train()
    assert len(micro_batches) == 4
    assert micro_batches[1] == micro_batches[3] == []  # the others sample first
    # transformers asks after each micro-batch whether the loss is finite, unless told not to.
    assert "trainer.py:_run_epoch" not in between.places


def test_what_waits_is_seen(build):
    trainer = build(gradient_accumulation_steps=2, max_steps=1, logging_nan_inf_filter=True, clip=None)
    trainer.prepare_micro_batch = lambda batch: {}
    with Waits() as waits:
        trainer.train()
    assert waits.places.count("trainer.py:_run_epoch") == 4
    assert waits.places.count("tiles.py:nonzero_positions") == 2
