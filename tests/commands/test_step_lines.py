# SPDX-License-Identifier: Apache-2.0
"""The commands print a line a logged step, a warning on one line, and nothing for the libraries' own programmers."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from trl_opsd.commands.step_lines import StepLines, duration, show_steps

# As OPSD logs its first step, shortened to what a line could take from it and a few of the others.
LOGS = {"loss": 8.0931, "grad_norm": 2.72, "learning_rate": 5e-6, "num_tokens": 400, "completions/mean_length": 26}
LOGS |= {"rewards/accuracy_reward/mean": 0.375, "reward": 0.375, "divergence": 8.0931, "clipped_share": 0, "epoch": 1}


def state(step=1, is_first=True):
    return SimpleNamespace(global_step=step, max_steps=3, is_world_process_zero=is_first)


def lines_of(capsys, *logs, **of_state):
    callback = StepLines()
    callback.on_train_begin(None, state(0), None)
    for step, entry in enumerate(logs, 1):
        callback.on_log(None, state(step, **of_state), None, logs=entry)
    return capsys.readouterr().out.splitlines()


def test_a_step_is_a_line_with_the_numbers_that_tell_how_it_went(capsys):
    (line,) = lines_of(capsys, LOGS)
    assert line == (
        "step 1/3  loss 8.093  divergence 8.093  reward 0.375  length 26  gradient 2.72  lr 5e-06  0.0 s a step, 0 s left"
    )


def test_an_evaluation_and_the_end_are_lines_of_their_own(capsys):
    evaluated = {"eval_loss": 0.5, "eval_reward": 0.25, "eval_runtime": 3.0}
    measured = {"eval/avg@k": 0.4, "eval/gain": 0.1, "eval/completion_length": 12}
    assert lines_of(capsys, evaluated, measured, {"train_runtime": 200.0, "train_loss": 1.0}) == [
        "evaluation at step 1  loss 0.5  reward 0.25",
        "evaluation at step 2  avg@k 0.4  gain 0.1  length 12",
        "trained to step 3 in 3.3 min",
    ]


def test_only_the_first_process_prints(capsys):
    assert lines_of(capsys, LOGS, is_first=False) == []


@pytest.mark.parametrize(("seconds", "text"), [(8, "8 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_a_duration_has_the_unit_a_person_would_choose(seconds, text):
    assert duration(seconds) == text


def test_lines_take_the_place_of_bar_and_dictionary():
    trainer = CallbackHandler([ProgressCallback, PrinterCallback], None, None, None, None)
    show_steps(trainer)
    assert [type(callback) for callback in trainer.callbacks] == [StepLines]


def test_a_warning_is_one_line_and_deprecations_of_libraries_are_none():
    code = (
        "import warnings; from trl_opsd.commands.cli import main; main(['plot', 'nowhere'])\n"
        "warnings.warn('Collapse guard: look'); warnings.warn('old', FutureWarning); warnings.warn('old', DeprecationWarning)\n"
        "import tqdm; list(tqdm.tqdm([1, 2]))\n"
        "import logging; log = logging.getLogger('DeepSpeed'); log.addHandler(logging.StreamHandler())\n"
        "log.warning('Setting accelerator to CPU. If you have GPU'); log.warning('another')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *others = done.stderr.splitlines()
    assert first.startswith("trl-opsd plot: error: nowhere holds no trainer_state.json")
    assert others == ["warning: Collapse guard: look", "another"]


def test_importing_the_package_changes_nothing_of_how_libraries_print():
    code = "import warnings; before = warnings.formatwarning, list(warnings.filters); import trl_opsd, trl_opsd.commands.user_errors\n"
    code += "assert (warnings.formatwarning, list(warnings.filters)) == before"
    subprocess.run([sys.executable, "-c", code], check=True)
