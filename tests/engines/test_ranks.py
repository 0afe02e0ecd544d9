# SPDX-License-Identifier: Apache-2.0
"""Ranks with unequal shares of the work, down to none."""

import pytest
from launching import run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.exhaustive)])
def test_ranks_with_nothing_to_train_on_take_steps_of_loss_zero(tmp_path, engine):
    ours = run(engine, tmp_path / "run", "--method", "ogls-sd", "--all-right")
    assert (ours["engine"], ours["world"]) == (engine, 2)
    assert ours["losses"] == [0.0] * 3 and ours["history"] == []
