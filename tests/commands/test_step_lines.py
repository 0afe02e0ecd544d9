# SPDX-License-Identifier: Apache-2.0
"""The commands print a line a logged step, a warning on one line, and nothing for the libraries' own programmers."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from trl_opsd.commands import step_lines
from trl_opsd.commands.log_file import LogFile
from trl_opsd.commands.step_lines import StepLines, duration, show_steps

# As OPSD logs its first step, shortened to what a line could take from it and a few of the others.
LOGS = {"loss": 8.0931, "grad_norm": 2.72, "learning_rate": 5e-6, "num_tokens": 400, "completions/mean_length": 26}
LOGS |= {"rewards/accuracy_reward/mean": 0.375, "reward": 0.375, "divergence": 8.0931, "clipped_share": 0, "epoch": 1}


def state(step=1, is_first=True, tokens=0):
    return SimpleNamespace(global_step=step, max_steps=3, is_world_process_zero=is_first, num_input_tokens_seen=tokens)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds since the start, two more each time that a log is written."""
    now = [100.0]
    monkeypatch.setattr(step_lines.time, "perf_counter", lambda: now[0])
    return now


def lines_of(capsys, clock, *logs, tokens=0, **of_state):
    callback = StepLines()
    callback.on_train_begin(None, state(0, tokens=tokens), None)
    for step, entry in enumerate(logs, 1):
        clock[0] += 2
        callback.on_log(None, state(step, **of_state), None, logs=entry)
    return capsys.readouterr().out.splitlines()


def test_a_step_is_a_line_with_the_numbers_that_tell_how_it_went(capsys, clock):
    first, second = lines_of(capsys, clock, LOGS, {**LOGS, "num_tokens": 1400})
    numbers = "loss 8.093  divergence 8.093  reward 0.375  length 26  gradient 2.72  lr 5e-06"
    assert first == f"step 1/3  {numbers}  200 tokens/s  2.0 s a step, 4 s left"
    assert second == f"step 2/3  {numbers}  500 tokens/s  2.0 s a step, 2 s left"


def test_tokens_of_before_a_resume_do_not_count_and_a_trainer_that_counts_none_shows_none(capsys, clock):
    (line,) = lines_of(capsys, clock, LOGS, tokens=300)
    assert "  50 tokens/s  " in line
    (line,) = lines_of(capsys, clock, {"loss": 1.0})
    assert "tokens" not in line
    (line,) = lines_of(capsys, clock, LOGS, tokens=500)  # a trainer that counts anew when it is resumed
    assert "tokens" not in line


def test_the_log_file_holds_every_number_and_is_cut_at_the_step_that_a_run_resumes_from(tmp_path):
    args, callback = SimpleNamespace(output_dir=str(tmp_path)), LogFile()
    path = tmp_path / "log.jsonl"

    def log_steps(first, last, **of_state):
        callback.on_train_begin(args, state(first, **of_state), None)
        for step in range(first + 1, last + 1):
            callback.on_log(args, state(step, **of_state), None, logs={**LOGS, "loss": float(step)})

    def steps():
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    log_steps(0, 4)
    assert steps() == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 2, **LOGS, "loss": 2.0}
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while it wrote
    log_steps(2, 3)
    assert steps() == [1, 2, 3]
    log_steps(3, 5, is_first=False)
    assert steps() == [1, 2, 3]
    log_steps(0, 1)
    assert steps() == [1]


def test_an_evaluation_and_the_end_are_lines_of_their_own(capsys, clock):
    evaluated = {"eval_loss": 0.5, "eval_reward": 0.25, "eval_runtime": 3.0}
    measured = {"eval/avg@k": 0.4, "eval/gain": 0.1, "eval/completion_length": 12}
    assert lines_of(capsys, clock, evaluated, measured, {"train_runtime": 200.0, "train_loss": 1.0}) == [
        "evaluation at step 1  loss 0.5  reward 0.25",
        "evaluation at step 2  avg@k 0.4  gain 0.1  length 12",
        "trained to step 3 in 3.3 min",
    ]


def test_only_the_first_process_prints(capsys, clock):
    assert lines_of(capsys, clock, LOGS, is_first=False) == []


@pytest.mark.parametrize(("seconds", "text"), [(8, "8 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_a_duration_has_the_unit_a_person_would_choose(seconds, text):
    assert duration(seconds) == text


def test_lines_take_the_place_of_bar_and_dictionary(monkeypatch):
    trainer = CallbackHandler([ProgressCallback, PrinterCallback], None, None, None, None)
    monkeypatch.setenv("TRL_OPSD_VERBOSE", "1")
    show_steps(trainer)
    assert [type(callback) for callback in trainer.callbacks][-2:] == [ProgressCallback, PrinterCallback]
    monkeypatch.delenv("TRL_OPSD_VERBOSE")
    show_steps(trainer)
    assert [type(callback) for callback in trainer.callbacks] == [StepLines]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_warning_is_one_line_and_those_that_nobody_can_act_on_are_none(verbose):
    words = ["plot", "nowhere", *(["--verbose"] if verbose else [])]
    code = (
        f"import warnings; from trl_opsd.commands.cli import main; main({words})\n"
        "warnings.warn(\"'pin_memory' argument is set as true but no accelerator is found, then\")\n"
        "warnings.warn('Collapse guard: look'); warnings.warn('old', FutureWarning); warnings.warn('old', DeprecationWarning)\n"
        "import tqdm; list(tqdm.tqdm([1, 2]))\n"
        "import logging; log = logging.getLogger('DeepSpeed'); log.addHandler(logging.StreamHandler())\n"
        "log.warning('Setting accelerator to CPU. If you have GPU'); log.warning('another')\n"
    )
    # A command that ran in this process left the delay of bars in its environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("TQDM_DELAY", "TRL_OPSD_VERBOSE")}
    settings = {"capture_output": True, "text": True, "check": True, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **settings)
    first, *others = done.stderr.splitlines()
    assert first.startswith("trl-opsd plot: error: nowhere holds no trainer_state.json")
    if verbose:
        shown = done.stderr
        assert all(
            text in shown for text in ("pin_memory", "UserWarning: Collapse", "FutureWarning", "Setting acc", "2/2")
        )
    else:
        assert others == ["warning: Collapse guard: look", "another"]


def test_importing_the_package_changes_nothing_of_how_libraries_print():
    code = "import warnings; before = warnings.formatwarning, list(warnings.filters); import trl_opsd, trl_opsd.commands.user_errors\n"
    code += "assert (warnings.formatwarning, list(warnings.filters)) == before"
    subprocess.run([sys.executable, "-c", code], check=True)
