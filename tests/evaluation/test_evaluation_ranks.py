# SPDX-License-Identifier: Apache-2.0
"""A run of two processes measures what one process measures, and trains as it would have without."""

import pytest
from engines import RESUME_FROM, STEPS, differences, launch, save_models

pytestmark = pytest.mark.slow

CELLS = [
    {"measures": True},
    {"measures": True, "lora": True, "kind": "ema"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models):
    """Results of one process, with measurements and without."""
    folder = tmp_path_factory.mktemp("single")
    watched = launch("single", folder / "watched", CELLS, models)[1]
    plain = launch("single", folder / "plain", [{**cell, "measures": False} for cell in CELLS], models)[1]
    return watched, plain


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_measure_what_one_does(tmp_path, models, alone, engine):
    code, results = launch(engine, tmp_path / "run", CELLS, models)
    assert code == 0
    for ranks, (one,), (plain,) in zip(results, *alone, strict=True):
        assert "error" not in ranks[0], ranks[0]
        assert ranks[0]["engine"] == engine and ranks[0]["world"] == 2
        assert one["measured"] == [0, RESUME_FROM, STEPS] and len(one["texts"]) == 3
        assert len({tuple(texts) for texts in one["texts"]}) > 1  # training moves what is written
        for rank in ranks:
            assert rank["texts"] == one["texts"] and rank["measured"] == one["measured"]
        assert one["history"] == plain["history"]
        assert differences(ranks[0]["history"], one["history"], 5e-4, "one process") == []
