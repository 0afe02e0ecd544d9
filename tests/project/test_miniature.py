# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the whole family has a run of every method, with settings that its config takes."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import miniature

from trl_opsd.demo import build_rows
from trl_opsd.pages import PAGES, settings_of, trainer_of
from trl_opsd.rows.checks import check_rows


def test_every_method_of_the_table_has_a_run():
    kinds = {run.kind for run in [*miniature.RUNS.values(), *miniature.family().values()]}
    assert kinds >= PAGES.keys()


@pytest.mark.parametrize("name", miniature.family())
def test_the_settings_of_a_run_make_its_config(name, tmp_path):
    run = miniature.family()[name]
    settings = {**miniature.SETTINGS, **miniature.SAMPLING, **run.settings, "output_dir": str(tmp_path)}
    args = trainer_of(run.kind).config_class(**settings, use_cpu=True)
    assert args.max_completion_length == 96 and args.temperature == 1.0
    known = settings_of(run.kind)().__dict__
    assert {name for name in known if name.endswith("_prompt_template")} <= run.settings.keys()


@pytest.mark.parametrize(
    ("template", "short"),
    [
        ("{prompt} and {verdict} of {solution}", "{prompt}\n[reference]\n{solution}\n{verdict}\n[end]"),
        ("Advice: {skill}\n\n{prompt} \\boxed{}", "{prompt}\n[reference]\n{skill}\n[end]"),
        ("{solution} alone", "[reference]\n{solution}\n[end]"),
    ],
)
def test_prompts_have_their_slots_in_the_demos_form(template, short):
    assert miniature.demo_prompt(template) == short


def test_the_columns_of_a_row_come_from_its_own_task_and_hold_no_control_token():
    rows = [miniature.with_columns(row) for row in build_rows("validation", 20)]
    check_rows(rows, "rows", needs_solution=True)
    for row in rows:
        steps = row["solution"].split("\n")
        assert row["feedback"] == steps[-1] and row["rubric"] == steps[:-1]
        assert "=" not in row["plan"] and len(row["plan"].split("\n")) == len(steps) - 1


def test_a_span_is_the_last_result_of_a_rollout():
    rollout = SimpleNamespace(completion="1+6=7\n7-2=15\n\\boxed{15}", reward=1.0)
    ((start, end, kind, _),) = miniature.last_result(rollout)
    assert rollout.completion[start:end] == "15" and kind == "K"
    assert miniature.last_result(SimpleNamespace(completion="wait", reward=0.0)) == []


def test_sampled_tokens_are_summed_over_logging_intervals():
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    log = [
        {"step": 1, "completions/mean_length": 10.0},
        {"step": 5, "completions/mean_length": 20.0, "written/tokens": 8},
    ]
    log += [{"step": 5, "train_runtime": 1.0}]
    assert miniature.sampled_tokens(log, settings) == 8 * 10 + 4 * (8 * 20 + 8)


def test_the_commands_in_the_docs_have_options_that_exist():
    text = (Path(__file__).parents[2] / "docs" / "miniature.md").read_text()
    options = set(re.findall(r"miniature\.py (.*?)(?:#|`|\n)", text))
    source = Path(miniature.__file__).read_text()
    for option in re.findall(r"--\w+", " ".join(options)):
        assert f'"{option}"' in source
