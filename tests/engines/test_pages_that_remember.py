# SPDX-License-Identifier: Apache-2.0
"""Pages with peers, token weights and memory give on two ranks the numbers of one process, and remember alike."""

import pytest
from engines import flaws, launch, save_models

PAGES = [
    {"method": "antisd", "kind": "live", "resume": True},
    {"method": "demopsd", "kind": "ema", "resume": True},
    {"method": "egrsd", "kind": "base", "resume": True},
]


def numbers_in(memory):
    """The numbers of a memory, in order."""
    values = memory.values() if isinstance(memory, dict) else memory
    return [n for value in values for n in (numbers_in(value) if isinstance(value, list | dict) else [value])]


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one_process_and_remember_the_same(tmp_path):
    models = save_models(tmp_path)
    code, ones = launch("single", tmp_path / "single", PAGES, models)
    assert code == 0
    code, results = launch("ddp", tmp_path / "ddp", PAGES, models)
    assert code == 0
    for number, cell in enumerate(PAGES):
        first, second = results[number]
        assert flaws("ddp", cell, [first, second], ones[number][0], tmp_path / "ddp" / str(number), models) == []
        assert first["memory"] == second["memory"]
        assert numbers_in(first["memory"]) == pytest.approx(numbers_in(ones[number][0]["memory"]), rel=5e-4)
        assert bool(first["memory"]) == (cell["method"] != "demopsd")
