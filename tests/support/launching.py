# SPDX-License-Identifier: Apache-2.0
"""Starts `fault_worker.py` on one process or two, as a user's launcher would."""

import json
import os
import subprocess

from engines import BIN, RECIPES, ROOT, command_of, free_port

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


def launch_on_two_machines(folder, *options, worker=WORKER, processes=2):
    """Start two launchers, as two machines would, of two processes each; their exit codes and what they printed."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    # Not `--cpu`, with which accelerate starts one process that knows of no other machine and waits for MPI.
    words = [
        "--config_file",
        str(RECIPES / "ddp.yaml"),
        "--num_machines",
        "2",
        "--num_processes",
        str(2 * processes),
        "--main_process_ip",
        "127.0.0.1",
    ]
    words += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
    started = []
    for rank in range(2):
        command = [str(BIN / "accelerate"), "launch", *words, "--machine_rank", str(rank)]
        with (folder / f"machine-{rank}.log").open("w") as log:
            settings = {"env": environment, "stdout": log, "stderr": subprocess.STDOUT, "cwd": folder}
            started.append(subprocess.Popen([*command, worker, "--output", str(folder), *options], **settings))
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.terminate()
            process.wait()
    return codes, [(folder / f"machine-{rank}.log").read_text() for rank in range(2)]


def run(engine, folder, *options, worker=WORKER):
    done = launch(engine, folder, *options, worker=worker)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "numbers.json").read_text())
