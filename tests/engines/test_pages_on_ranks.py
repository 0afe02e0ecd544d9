# SPDX-License-Identifier: Apache-2.0
"""Pages that ask the model, read several views or mix weights take on two ranks the steps they take on one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import run

WORKER = str(Path(__file__).parents[1] / "support" / "page_worker.py")
PAGES = (
    "sgsd",
    "pbsd",
    "rcsd",
    "sdpo",
    "sdpo-mix",
    "mopd",
    "resd",
    "sort",
    "critique",
    "sgsd-bank",
    "msd",
    "ssopd",
    "trace",
    "vopd",
    "rethinking-opd",
    "rlrt",
    "two-terms",
    "stableopd",
    "brts",
)


def run_alone(folder, *options):
    folder.mkdir(parents=True)
    command = [sys.executable, WORKER, "--output", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "numbers.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_two_ranks_take_the_steps_of_one_process(tmp_path, page):
    alone = run_alone(tmp_path / "one", "--page", page)
    ranks = run("ddp", tmp_path / "two", "--page", page, worker=WORKER)
    assert (alone["world"], ranks["world"]) == (1, 2)
    assert ranks["losses"] == pytest.approx(alone["losses"], rel=1e-3, abs=1e-6)
    assert ranks["norms"] == pytest.approx(alone["norms"], rel=5e-3, abs=1e-6)
    assert ranks["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    assert all(norm > 0 for norm in alone["norms"])


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
