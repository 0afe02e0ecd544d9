# SPDX-License-Identifier: Apache-2.0
"""Every seam of a method gives on two ranks the steps of one process: what is asked, read, mixed, weighed and remembered."""

from pathlib import Path

import pytest
from engines import RESUME_FROM, flaws, launch, save_models
from launching import run
from page_cells import PAGES, REMEMBERING

WORKER = str(Path(__file__).parents[1] / "support" / "page_worker.py")
# Correction prompts wait in a queue of their own, which a checkpoint holds too.
CELLS = [{"page": name, "resume": name in (*REMEMBERING, "corrections"), "lora": name == "sdpo-mix"} for name in PAGES]
ADAPTED = [{"page": name, "resume": True, "lora": True} for name in ("antisd", "demopsd", "egrsd")]
# What is written before scoring is given in the others; here the model writes it, and its rollouts.
WRITING = [{"page": name, "resume": False, "lora": False, "generate": True} for name in ("rcsd", "pbsd")]
# These three use every seam but a target of two views, which `COVER` has: a weight of the divergence, its support, a text written
# first and a memory; advantages from a view that is read, and a gate; a sequence beside the rollouts, and a second owner of weights.
OF_EVERY_COMMIT = [cell for cell in CELLS if cell["page"] in ("resd", "antisd", "stableopd")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of the models, and a function from cells to their results in one process, each of which runs once."""
    folder, known = tmp_path_factory.mktemp("alone"), {}
    models = save_models(folder)

    def results(cells):
        new = [cell for cell in cells if str(cell) not in known]
        if new:
            code, found = launch("single", folder / f"run{len(known)}", new, models)
            assert code == 0
            known.update((str(cell), result[0]) for cell, result in zip(new, found, strict=True))
        return [known[str(cell)] for cell in cells]

    return models, results


def alike(memory, other):
    """Whether two memories hold the same names and texts, and the same numbers to 5e-4."""
    if isinstance(memory, dict):
        return memory.keys() == other.keys() and all(alike(memory[name], other[name]) for name in memory)
    if isinstance(memory, list):
        return len(memory) == len(other) and all(map(alike, memory, other))
    return memory == other if isinstance(memory, str) else memory == pytest.approx(other, rel=5e-4)


def memory_flaws(cell, first, second, one):
    """What does not hold of the memories of two ranks and of one process, and of a run that resumed, as sentences."""
    if "error" in first:
        return []
    found = [] if first["memory"] == second["memory"] else ["two ranks remember differently"]
    if not alike(first["memory"], one["memory"]):
        found.append(f"ranks remember {first['memory']}, one process {one['memory']}")
    if bool(first["memory"]) != (cell["page"] in REMEMBERING):
        found.append(f"it remembers {first['memory']}")
    if cell["resume"] and first["resumed"] != first["history"][RESUME_FROM:]:
        found.append(f"resumed {first['resumed']}, uninterrupted {first['history'][RESUME_FROM:]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "cells"),
    [
        pytest.param("ddp", CELLS, id="ddp"),
        pytest.param("zero3", OF_EVERY_COMMIT, id="zero3"),
        *(
            pytest.param(engine, [*CELLS, *ADAPTED, *WRITING], id=f"{engine}-all", marks=pytest.mark.exhaustive)
            for engine in ("zero3", "fsdp2")
        ),
    ],
)
def test_two_ranks_take_the_steps_of_one_process(tmp_path, alone, engine, cells):
    models, results_alone = alone
    ones = results_alone(cells)
    assert not [one for one in ones if "error" in one]
    code, results = launch(engine, tmp_path / engine, cells, models)
    found = {}
    for number, (cell, one) in enumerate(zip(cells, ones, strict=True)):
        own = flaws(engine, cell, results[number], one, tmp_path / engine / str(number), models)
        own += memory_flaws(cell, *results[number], one)
        own += [] if all(step["grad_norm"] > 0 for step in one["history"]) else ["a step without a gradient"]
        own += [] if cell["page"] != "sort" or "groups/all_wrong" in one["kinds"] else ["no reference was repaired"]
        found |= {str(cell): own} if own else {}
    assert found == {}
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", ["pbsd", "sgsd"])
def test_rows_that_change_ranks_leave_the_slower_rank_less_to_do_and_the_same_steps(tmp_path, page):
    moved, padded = (
        run("ddp", tmp_path / name, "--page", page, *options, worker=WORKER)
        for name, options in (("moved", []), ("padded", ["--padded"]))
    )
    for name in ("losses", "norms"):
        assert moved[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-7)
    assert moved["weights"] == pytest.approx(padded["weights"], rel=1e-6)
    assert [sum(rank["moved"] for rank in numbers["rows"]) > 0 for numbers in (moved, padded)] == [True, False]
    positions = [max(rank["positions"] for rank in numbers["rows"]) for numbers in (moved, padded)]
    assert 0 < positions[0] < 0.95 * positions[1]


@pytest.mark.slow
def test_turns_with_tools_take_on_two_ranks_the_steps_of_one_process(tmp_path):
    one, two = (run(engine, tmp_path / engine, "--page", "tools", worker=WORKER) for engine in ("single", "ddp"))
    assert (one["world"], two["world"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3, abs=1e-6)
    assert two["norms"] == pytest.approx(one["norms"], rel=5e-3, abs=1e-6)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4)
    assert all(norm > 0 for norm in one["norms"])
