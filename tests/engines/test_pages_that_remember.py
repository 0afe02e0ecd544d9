# SPDX-License-Identifier: Apache-2.0
"""Pages with peers, token weights and memory give on two ranks the numbers of one process, and remember alike."""

import pytest
from engines import flaws, launch, save_models

PAGES = [
    {"method": "antisd", "kind": "live", "resume": True},
    {"method": "demopsd", "kind": "ema", "resume": True},
    {"method": "egrsd", "kind": "base", "resume": True},
]
CELLS = PAGES + [{**page, "lora": True} for page in PAGES]


def numbers_in(memory):
    """The numbers of a memory, in order."""
    values = memory.values() if isinstance(memory, dict) else memory
    return [n for value in values for n in (numbers_in(value) if isinstance(value, list | dict) else [value])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of the models, and the results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    models = save_models(folder)
    code, results = launch("single", folder / "run", CELLS, models)
    assert code == 0
    return models, [result[0] for result in results]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(e, marks=pytest.mark.exhaustive) for e in ("zero3", "fsdp2"))]
)
def test_two_ranks_give_the_numbers_of_one_process_and_remember_the_same(tmp_path, alone, engine):
    models, ones = alone
    code, results = launch(engine, tmp_path / engine, CELLS, models)
    assert code == 0
    for number, (cell, one) in enumerate(zip(CELLS, ones, strict=True)):
        first, second = results[number]
        assert flaws(engine, cell, [first, second], one, tmp_path / engine / str(number), models) == []
        assert first["memory"] == second["memory"]
        assert numbers_in(first["memory"]) == pytest.approx(numbers_in(one["memory"]), rel=5e-4)
        assert bool(first["memory"]) == (cell["method"] != "demopsd")
