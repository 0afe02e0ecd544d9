# SPDX-License-Identifier: Apache-2.0
"""Two launchers of two processes each, as two machines would run them: the numbers of one process, and a machine that dies.

Both stand on one machine and speak over gloo, so what is tested is the launch, the ranks and the files, and no network.
"""

import json

import pytest
import torch
from launching import launch_on_two_machines, run
from safetensors.torch import load_file

from trl_opsd.checkpoints.manifest import complete_steps

OPTIONS = ("--save", "--own-batches", "--kind", "ema")
pytestmark = pytest.mark.slow


def numbers_of(folder):
    """The log of a run, and the weights that it saved."""
    return json.loads((folder / "numbers.json").read_text()), load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run("single", folder, *OPTIONS)
    return numbers_of(folder)


def check_equal(found, wanted):
    (numbers, weights), (one, of_one) = found, wanted
    assert (numbers["engine"], numbers["world"]) == ("ddp", 4) and one["world"] == 1
    assert len(numbers["history"]) == len(one["history"]) == 6
    for a, b in zip(numbers["history"], one["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
    for name, value in of_one.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_two_machines_give_the_numbers_of_one_process(tmp_path, one_process):
    codes, logs = launch_on_two_machines(tmp_path, *OPTIONS)
    assert codes == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    check_equal(numbers_of(tmp_path), one_process)


@pytest.mark.exhaustive  # three launches; CI kills one of two processes of one launcher (tests/checkpoints/test_faults.py)
def test_a_machine_that_dies_ends_the_other_and_the_run_resumes_to_the_same_numbers(tmp_path, one_process):
    codes, logs = launch_on_two_machines(tmp_path, *OPTIONS, "--fault", "kill-after-step")
    assert all(codes) and "fault at" in logs[1] and "fault at" not in logs[0]
    found = complete_steps(tmp_path / "out")
    assert max(step for step, state in found.items() if state == "complete") == 3
    codes, logs = launch_on_two_machines(tmp_path, *OPTIONS, "--resume")
    assert codes == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    check_equal(numbers_of(tmp_path), one_process)
