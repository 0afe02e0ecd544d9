# SPDX-License-Identifier: Apache-2.0
"""The Slurm script, run whole with commands that stand in for Slurm's, vLLM's and ours: what it starts, where, and when it ends."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "slurm" / "train.slurm"

# Each notes what it was called with. `srun` runs its command once for each node that it was given, as Slurm does.
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "%s\\n" $NODES; else echo "scontrol $*" >>calls; fi',
    "srun": """
words=("$@")
for i in "${!words[@]}"; do
    case ${words[i]} in --nodelist=*) nodes=${words[i]#--nodelist=} ;; --*) ;; *) break ;; esac
done
number=0 pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null; wait; exit 143' TERM
for node in ${nodes//,/ }; do
    SLURM_NODEID=$number NODE=$node "${words[@]:i}" & pids+=($!)
    number=$((number + 1))
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
""",
    "vllm": 'echo "$NODE vllm $* dev=$VLLM_SERVER_DEV_MODE" >>calls; eval "$VLLM_DOES"',
    "curl": 'echo "curl ${!#}" >>calls; [[ -e healthy ]]',
    "trl-opsd": 'echo "$NODE trl-opsd $*" >>calls; eval "$TRAINING_DOES"',
}
LIVES = 'trap "echo $NODE ended >>calls; exit 143" TERM; touch healthy; while :; do sleep 0.05; done'


@pytest.fixture
def job(tmp_path):
    """A function that starts the script in a job of three nodes; settings are environment variables."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("max_steps: 2\n")
    started = []

    def start(**settings):
        environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "POLL_SECONDS": "0.05"}
        environment |= {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "7", "NODES": "n1 n2 n3"}
        environment |= {"RECIPE": "recipe.yaml", "MODEL": "a/model", "OUTPUT_DIR": "run", "VLLM_DOES": LIVES}
        environment |= {"TRAINING_DOES": "true", **settings}
        output = {"stdout": (tmp_path / "log").open("w"), "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            ["bash", str(SCRIPT)], cwd=tmp_path, env=environment, start_new_session=True, **output
        )
        output["stdout"].close()
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # as Slurm does at the end of a job
        process.wait()


def finished(process, tmp_path):
    """Exit code and output of a job."""
    return process.wait(60), (tmp_path / "log").read_text()


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def training_calls(tmp_path):
    return sorted(line for line in calls(tmp_path) if " trl-opsd " in line)


def wait_for(tmp_path, text):
    for _ in range(600):
        if (tmp_path / "calls").exists() and text in (tmp_path / "calls").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in the calls")


def test_the_last_node_serves_and_the_others_train_once_it_is_healthy(job, tmp_path):
    code, output = finished(job(TRAINING_WORDS="--max_steps 3", SERVER_WORDS="--max-model-len 2048"), tmp_path)
    assert code == 0, output
    lines = calls(tmp_path)
    (server,) = [line for line in lines if " vllm " in line]
    assert server.startswith("n3 vllm serve a/model --host 0.0.0.0 --port 8000") and "dev=1" in server
    assert '--weight-transfer-config {"backend": "nccl"}' in server and "--max-model-len 2048" in server
    first, second = training_calls(tmp_path)
    assert lines.index(first) > lines.index("curl http://n3:8000/health")
    assert first.startswith("n1 ") and first.endswith("--max_steps 3 --machine_rank 0")
    assert second.startswith("n2 ") and second.endswith("--max_steps 3 --machine_rank 1")
    for words in (
        "opsd --config recipe.yaml --model_name_or_path a/model --output_dir run",
        "--num_machines 2 --num_processes 16 --main_process_ip n1 --main_process_port 29500",
        "--use_vllm true --vllm_mode server --vllm_server_base_url http://n3:8000",
        "--ddp_timeout 3600",
    ):
        assert words in first and words in second
    assert "--resume_from_checkpoint" not in first
    assert "n3 ended" in lines  # the server is not left behind


def test_the_words_for_our_command_are_ones_that_it_knows(job, tmp_path, monkeypatch):
    from accelerate.commands.launch import launch_command_parser

    from trl_opsd.commands.arguments import read_command_line
    from trl_opsd.commands.launch import launch_words
    from trl_opsd.commands.train import argument_types

    finished(job(), tmp_path)
    words = training_calls(tmp_path)[1].split()[2:]
    monkeypatch.chdir(tmp_path)
    line = read_command_line(words[1:], argument_types("opsd"))
    launched = launch_command_parser().parse_args(launch_words("opsd", line))
    assert (launched.num_machines, launched.machine_rank, launched.main_process_ip) == (2, 1, "n1")
    assert launched.deepspeed_multinode_launcher == "standard" and launched.config_file.endswith("zero3.yaml")


@pytest.mark.parametrize(("state", "resumes"), [("true", True), ("false", False)])
def test_a_job_that_starts_again_resumes_from_a_whole_checkpoint(job, tmp_path, state, resumes):
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-5" / "trl_opsd_checkpoint.json").write_text(f'{{\n "complete": {state}\n}}')
    assert finished(job(), tmp_path)[0] == 0
    assert all(("--resume_from_checkpoint true" in line) == resumes for line in training_calls(tmp_path))


def test_the_marker_that_the_script_looks_for_is_the_one_that_a_checkpoint_has(tmp_path):
    from trl_opsd.checkpoints import manifest

    with manifest.writing_checkpoint(
        tmp_path / "checkpoint-1", marks=True, wait=lambda: None, run="r", initial_weights=None
    ):
        assert '"complete": false' in (tmp_path / "checkpoint-1" / manifest.MARKER).read_text()
    assert '"complete": true' in (tmp_path / "checkpoint-1" / manifest.MARKER).read_text()
    assert manifest.MARKER in SCRIPT.read_text()


def test_before_the_limit_both_steps_end_and_the_job_goes_back_into_the_queue(job, tmp_path):
    process = job(TRAINING_DOES=LIVES)
    wait_for(tmp_path, "n2 trl-opsd")
    os.kill(process.pid, signal.SIGUSR1)
    code, output = finished(process, tmp_path)
    assert code == 0 and "goes back into the queue" in output
    lines = calls(tmp_path)
    assert lines[-1] == "scontrol requeue 7"
    assert {"n1 ended", "n2 ended", "n3 ended"} <= set(lines[:-1])


def test_a_server_that_does_not_end_keeps_no_job_from_the_queue(job, tmp_path):
    process = job(VLLM_DOES='trap "" TERM; touch healthy; sleep 300', TRAINING_DOES=LIVES, GRACE_SECONDS="1")
    wait_for(tmp_path, "n2 trl-opsd")
    os.kill(process.pid, signal.SIGUSR1)
    assert finished(process, tmp_path)[0] == 0
    assert calls(tmp_path)[-1] == "scontrol requeue 7"


def test_a_signal_while_the_server_loads_requeues_too(job, tmp_path):
    process = job(VLLM_DOES=LIVES.replace("touch healthy;", ""))
    wait_for(tmp_path, "curl")
    os.kill(process.pid, signal.SIGUSR1)
    assert finished(process, tmp_path)[0] == 0
    assert calls(tmp_path)[-1] == "scontrol requeue 7" and not training_calls(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"VLLM_DOES": "exit 3"}, "vLLM on n3 ended before it was ready"),
        (
            {"VLLM_DOES": "exec sleep 60", "SERVER_SECONDS": "1"},
            "vLLM on n3 is not ready after 1 s. Set SERVER_SECONDS",
        ),
        ({"NODES": "n1"}, "the job has 1 node(s)"),
        ({"MODEL": ""}, "MODEL is not set"),
        ({"OUTPUT_DIR": ""}, "OUTPUT_DIR is not set"),
        ({"RECIPE": "nowhere.yaml"}, "RECIPE='nowhere.yaml' is not a file"),
    ],
)
def test_what_cannot_train_is_told_before_training_begins(job, tmp_path, settings, told):
    code, output = finished(job(**settings), tmp_path)
    assert code == 1 and told in output
    assert not (tmp_path / "calls").exists() or not training_calls(tmp_path)


def test_a_server_that_dies_ends_the_training_and_a_failed_training_the_server(job, tmp_path):
    dies = "touch healthy; until grep -q trl-opsd calls; do sleep 0.05; done; exit 9"
    code, output = finished(job(VLLM_DOES=dies, TRAINING_DOES=LIVES), tmp_path)
    assert code == 1 and "vLLM on n3 ended with code 9 while the model was trained" in output
    assert {"n1 ended", "n2 ended"} <= set(calls(tmp_path))
    (tmp_path / "calls").unlink()
    assert finished(job(TRAINING_DOES="exit 5"), tmp_path)[0] == 5
    assert "n3 ended" in calls(tmp_path) and not any("requeue" in line for line in calls(tmp_path))


def test_the_recipe_of_skypilot_starts_our_command_with_words_that_it_knows(tmp_path, monkeypatch):
    from accelerate.commands.launch import launch_command_parser

    from trl_opsd.commands.arguments import read_command_line
    from trl_opsd.commands.launch import launch_words
    from trl_opsd.commands.train import argument_types

    task = yaml.safe_load((ROOT / "recipes" / "skypilot" / "train.yaml").read_text())
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    (tmp_path / "trl-opsd").write_text('#!/bin/bash\necho "trl-opsd $*" >>calls\n')
    (tmp_path / "trl-opsd").chmod(0o755)
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    given |= {**task["envs"], "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = os.environ | given | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", task["run"]], cwd=tmp_path, env=environment, check=True)
    (line,) = calls(tmp_path)
    command = read_command_line(
        ["--config", str(ROOT / "recipes" / "opsd.yaml"), *line.split()[4:]], argument_types("opsd")
    )
    launched = launch_command_parser().parse_args(launch_words("opsd", command))
    assert (launched.num_processes, launched.machine_rank, launched.main_process_ip) == (16, 1, "10.0.0.1")
    assert "--resume_from_checkpoint" not in line


def test_bash_and_shellcheck_have_nothing_to_say():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
