# SPDX-License-Identifier: Apache-2.0
"""Two real processes give the numbers of one: same global batch, same given rollouts, every step of the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WORKER = str(ROOT / "tests" / "distributed_worker.py")

LAUNCHERS = {
    "single": [sys.executable],
    "ddp": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "zero2": [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "recipes/accelerate/zero2_cpu.yaml")],
    "zero3": [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "recipes/accelerate/zero3_cpu.yaml")],
}


def launch(engine, folder, *options):
    folder.mkdir(parents=True, exist_ok=True)
    # With ACCELERATE_USE_CPU set, accelerate would take DDP whatever the DeepSpeed file says.
    cpu = {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | cpu
    # DeepSpeed builds its CPU operators with the environment's ninja.
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    command = [*LAUNCHERS[engine], WORKER, "--output", str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)


def run(engine, folder, *options):
    done = launch(engine, folder, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "numbers.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    results = {}

    def get(*options):
        if options not in results:
            results[options] = run("single", tmp_path_factory.mktemp("single") / "run", *options)
        return results[options]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", ("--kind", "base")),
        ("ddp", ("--kind", "ema", "--lora")),
        ("ddp", ("--kind", "live", "--tied")),
        ("ddp", ("--method", "ogls-sd")),  # each group straddles both ranks
        ("ddp", ("--method", "ogls-sd", "--tail-anchor")),  # the ranks have different numbers of anchored tokens
        ("ddp", ("--method", "purified-opsd", "--lora")),
        ("zero2", ("--kind", "base")),
        ("zero3", ("--kind", "base")),
        ("zero3", ("--kind", "ema", "--lora")),
        ("zero3", ("--method", "ogls-sd")),  # the ranks have different numbers of wrong rollouts
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value).replace("--kind", "").replace("--", "-"),
)
def test_two_processes_give_the_numbers_of_one(tmp_path, single, engine, options):
    ours = run(engine, tmp_path / "run", *options)
    assert (ours["engine"], ours["world"]) == (engine, 2)
    one = single(*options)
    assert (one["engine"], one["world"]) == ("single", 1)
    assert len(ours["history"]) == len(one["history"]) == 3
    for step, (a, b) in enumerate(zip(ours["history"], one["history"], strict=True)):
        for name in a:
            # The first step is the same arithmetic; later ones have gone through an optimizer.
            assert a[name] == pytest.approx(b[name], rel=1e-5 if step == 0 else 1e-4), (step, name)
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_ranks_with_nothing_to_train_on_take_steps_of_loss_zero(tmp_path, engine):
    ours = run(engine, tmp_path / "run", "--method", "ogls-sd", "--all-right")
    assert (ours["engine"], ours["world"]) == (engine, 2)
    assert ours["losses"] == [0.0] * 3 and ours["history"] == []
