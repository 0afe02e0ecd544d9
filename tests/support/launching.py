# SPDX-License-Identifier: Apache-2.0
"""Starts `fault_worker.py` on one process or two, as a user's launcher would."""

import json
import os
import subprocess

from engines import BIN, ROOT, command_of

WORKER = str(ROOT / "tests" / "support" / "fault_worker.py")

TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]


def launch(engine, folder, *options, worker=WORKER):
    folder.mkdir(parents=True, exist_ok=True)
    # With ACCELERATE_USE_CPU set, accelerate would take DDP whatever the DeepSpeed file says.
    cpu = {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | cpu
    # DeepSpeed builds its CPU operators with the environment's ninja.
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    launcher = TORCHRUN if engine == "ddp" else command_of(engine)
    command = [*launcher, worker, "--output", str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)


def run(engine, folder, *options, worker=WORKER):
    done = launch(engine, folder, *options, worker=worker)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "numbers.json").read_text())
