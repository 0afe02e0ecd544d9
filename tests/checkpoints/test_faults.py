# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed or raise: the run ends soon and says why, and its resumption is the uninterrupted run."""

import json
import re
import shutil
import time

import pytest
import torch
from launching import launch, run
from safetensors.torch import load_file

from trl_opsd.checkpoints.manifest import complete_steps

# All in the fourth step, so that the run goes on from the third, in the middle of a generation batch.
KILLS = ("kill-in-step", "kill-after-step", "kill-weights-saved", "kill-almost-saved")
OPTIONS = ("--save", "--generate")


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def killed_and_resumed(engine, folder, kill, *options):
    """Numbers and weights of a run that was killed in its fourth step and resumed."""
    dead = launch(engine, folder, *OPTIONS, *options, "--fault", kill)
    assert dead.returncode != 0 and "fault at" in dead.stderr
    found = complete_steps(folder / "out")
    assert max(step for step, state in found.items() if state == "complete") == 3
    assert found.get(4, "half-written") == "half-written"
    resumed = launch(engine, folder, *OPTIONS, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert ("run ended while it was being saved" in resumed.stderr) == (4 in found)
    return json.loads((folder / "numbers.json").read_text()), load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    results = {}

    def get(engine, *options):
        if (engine, options) not in results:
            folder = tmp_path_factory.mktemp("whole") / "run"
            numbers = run(engine, folder, *OPTIONS, *options)
            results[engine, options] = numbers, load_file(folder / "model" / "model.safetensors")
        return results[engine, options]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kill", [KILLS[0], KILLS[3], *map(exhaustive, KILLS[1:3])])
def test_one_process_killed_and_resumed_gives_the_same_bits(tmp_path, whole, kill):
    numbers, weights = whole("single", "--kind", "ema")
    again, other = killed_and_resumed("single", tmp_path / "run", kill, "--kind", "ema")
    assert again["history"] == numbers["history"] and len(numbers["history"]) == 6
    assert all(torch.equal(value, other[name]) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kill", "options"),
    [
        ("ddp", "kill-in-step", ("--kind", "ema")),
        exhaustive("ddp", "kill-almost-saved", ("--kind", "live")),
        exhaustive("ddp", "kill-after-step", ("--kind", "base")),
        exhaustive("zero3", "kill-weights-saved", ("--kind", "ema")),
        exhaustive("zero3", "kill-almost-saved", ("--kind", "base")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_two_processes_one_killed_and_resumed_give_the_same_curve(tmp_path, whole, engine, kill, options):
    numbers, weights = whole(engine, *options)
    assert (numbers["engine"], numbers["world"]) == (engine, 2)
    again, other = killed_and_resumed(engine, tmp_path / "run", kill, *options)
    assert len(numbers["history"]) == len(again["history"]) == 6
    for a, b in zip(numbers["history"], again["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
def test_two_processes_fall_back_together_from_a_file_of_one_rank_that_was_damaged(tmp_path):
    numbers = run("ddp", tmp_path / "run", *OPTIONS, "--kind", "base")
    damaged = tmp_path / "run" / "out" / "checkpoint-6" / "trl_opsd_state-00001-of-00002.json"
    damaged.write_text(damaged.read_text().replace('"step"', '"Step"', 1))
    resumed = launch("ddp", tmp_path / "run", *OPTIONS, "--kind", "base", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert f"{damaged} was altered" in resumed.stderr and "checkpoint-5" in resumed.stderr
    again = json.loads((tmp_path / "run" / "numbers.json").read_text())
    for a, b in zip(numbers["history"], again["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    assert not list((tmp_path / "run" / "out").glob("*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "fault", "told"),
    [
        ("ddp", "kill-in-step", "Signal 9"),
        exhaustive("ddp", "raise-in-reward", "RuntimeError: injected: raise-in-reward"),
        ("ddp", "raise-in-teacher", "RuntimeError: injected: raise-in-teacher"),
        exhaustive("ddp", "raise-in-save", "checkpoint-4 was being saved"),
        exhaustive("zero3", "kill-in-step", "Signal 9"),
        exhaustive("zero3", "raise-in-teacher", "RuntimeError: injected: raise-in-teacher"),
    ],
)
def test_a_fault_on_one_rank_ends_all_within_a_minute_with_its_cause(tmp_path, engine, fault, told):
    done = launch(engine, tmp_path / "run", *OPTIONS, "--fault", fault)
    seconds = time.time() - float(re.search(r"fault at ([\d.]+)", done.stderr)[1])
    assert done.returncode != 0 and told in done.stderr
    assert seconds < 60
    assert complete_steps(tmp_path / "run" / "out")[3] == "complete"
    shutil.rmtree(tmp_path / "run")
