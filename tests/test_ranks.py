# SPDX-License-Identifier: Apache-2.0
"""Ranks with unequal shares of the work, down to none."""

import pytest
from launching import run


@pytest.mark.slow
def test_ranks_with_different_numbers_of_anchored_tokens_give_the_numbers_of_one(tmp_path):
    options = ("--method", "ogls-sd", "--tail-anchor")
    one, two = (run(engine, tmp_path / engine, *options) for engine in ("single", "ddp"))
    assert (two["engine"], two["world"]) == ("ddp", 2)
    assert len(one["history"]) == len(two["history"]) == 3
    for step, (a, b) in enumerate(zip(two["history"], one["history"], strict=True)):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5 if step == 0 else 1e-4), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.exhaustive)])
def test_ranks_with_nothing_to_train_on_take_steps_of_loss_zero(tmp_path, engine):
    ours = run(engine, tmp_path / "run", "--method", "ogls-sd", "--all-right")
    assert (ours["engine"], ours["world"]) == (engine, 2)
    assert ours["losses"] == [0.0] * 3 and ours["history"] == []
