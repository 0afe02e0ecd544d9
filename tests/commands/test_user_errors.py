# SPDX-License-Identifier: Apache-2.0
"""A user's error ends a command with one line that says what is wrong, where, and what to do; a bug keeps its traceback."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_opsd.commands import cli, launch, train
from trl_opsd.commands.arguments import method_names, read_command_line
from trl_opsd.commands.recipe_values import check_recipe_values
from trl_opsd.commands.train import TRAINERS, argument_types
from trl_opsd.commands.user_errors import TRACEBACK, sentence_of
from trl_opsd.demo import build_rows, model_path
from trl_opsd.errors import UsageError
from trl_opsd.teacher.prompts import left_pad
from trl_opsd.trainers.baselines import BASELINES

ROWS = build_rows("train", 8)
RECIPE = {
    "model_name_or_path": model_path(),
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 8,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "clip": "none",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in with rows and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(TRACEBACK, raising=False)
    write_rows("rows.jsonl", ROWS)
    write_recipe()
    return tmp_path


def write_rows(name, rows):
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def write_recipe(**changes):
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in {**RECIPE, **changes}.items()]
    Path("own.yaml").write_text("# of my own\n" + "".join(lines))


def told(capsys, *words):
    """The one line that a command ends with."""
    assert cli.main([str(word) for word in words]) == 2
    *bars, line = capsys.readouterr().err.splitlines()  # tqdm was imported before the command could calm its bars
    assert line.startswith(f"trl-opsd {words[0]}: error: ")
    assert not [bar for bar in bars if "it/s" not in bar and "examples" not in bar and bar.strip()]
    return line


def train_line(capsys, *words, dataset="rows.jsonl", method="opsd"):
    return told(capsys, method, "--config", "own.yaml", "--output_dir", "out", "--dataset_name", dataset, *words)


@pytest.mark.parametrize("method", ["opsd", "sft", "grpo"])
def test_a_missing_column_is_named_with_the_columns_there_are(place, capsys, method):
    write_rows("rows.jsonl", [{"prompt": row["prompt"], "answer": row["solution"]} for row in ROWS])
    assert "solution_column='solution' is not a column of rows.jsonl: ['prompt', 'answer']" in train_line(
        capsys, method=method
    )


@pytest.mark.parametrize("method", ["opsd", "sft", "grpo"])
def test_a_prompt_column_that_is_not_there_is_named_for_baselines_too(place, capsys, method):
    write_rows("rows.jsonl", [{"problem": "1+1=?", "solution": row["solution"]} for row in ROWS])
    line = train_line(capsys, "--num_generations=4" if method == "grpo" else "--seed=0", method=method)
    assert "train_dataset has no `prompt` column" in line


BAD_FILES = {
    "empty": ([], "dataset_name='rows.jsonl': the file is empty"),
    "cut": ([*ROWS[:2], '{"prompt": [{"role"\n', *ROWS[2:]], r"rows.jsonl, line 3, column 20: it is no JSON"),
    "list": ([*ROWS[:1], "[1, 2]\n"], "rows.jsonl, line 2: it is JSON, but no mapping of columns"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_of_rows_that_cannot_be_read_is_named_with_the_line(place, capsys, rows, message):
    write_rows("rows.jsonl", rows)
    assert message in train_line(capsys)


def test_an_evaluation_names_the_line_too(place, capsys):
    write_rows("rows.jsonl", [*ROWS[:2], "{\n"])
    line = told(capsys, "eval", "--models", model_path(), "--datasets", "rows.jsonl", "--output_dir", "results")
    assert "rows.jsonl, line 3, column" in line


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nobody/nothing"])
def test_a_dataset_that_is_not_there_is_named(place, capsys, name):
    assert name in train_line(capsys, dataset=name)


BAD_RECIPES = {
    "typo": ({"max_stepz": 3}, "own.yaml, line 11: max_stepz is not known. Did you mean `max_steps`?"),
    "list": ({"max_steps": [1]}, "own.yaml, line 3: max_steps is [1], but takes a whole number."),
    "text": ({"max_steps": "soon"}, "own.yaml, line 3: max_steps is 'soon', but takes a whole number."),
    "fraction": ({"max_steps": 1.5}, "max_steps is 1.5, but takes a whole number"),
    "nothing": ({"max_steps": None}, "max_steps is None, but takes a whole number"),
    "yes": ({"use_cpu": "maybe"}, "use_cpu is 'maybe', but takes true or false"),
    "no": ({"clip": False}, 'clip is False, but takes a text or null. Write "no" in quotes if you mean the text.'),
    "range": ({"clip_value": -1.0}, "clip_value=-1.0 is not a finite number > 0; set one"),
    "env": ({"env": "A=1"}, "own.yaml, line 11: env is 'A=1'; write one `NAME: value` a line"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_recipes_key_or_value_is_refused_with_file_line_and_kind(place, capsys, changes, message):
    write_recipe(**changes)
    assert message in train_line(capsys)


def test_a_recipe_that_is_no_yaml_is_refused_with_its_line(place, capsys):
    Path("own.yaml").write_text("clip: none\nmax_steps: [1\nbf16: false\n")
    assert "--config own.yaml, line 3: it is no YAML" in train_line(capsys)


def test_a_word_of_a_wrong_kind_is_a_line_without_the_options(place, capsys):
    assert "invalid int value: 'soon'" in train_line(capsys, "--max_steps", "soon")
    assert "argument --num_samples: invalid int value" in told(
        capsys, "eval", "--models", "a", "--datasets", "b", "--num_samples", "many"
    )


@pytest.mark.parametrize("folder", ["rows.jsonl", "rows.jsonl/deeper"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(place, capsys, folder, monkeypatch):
    monkeypatch.setattr(train, "load_rows", None)
    assert "rows.jsonl" in train_line(capsys, "--output_dir", folder)
    line = told(capsys, "eval", "--models", "a", "--datasets", "b", "--output_dir", folder)
    assert "choose another place" in line


def test_a_model_that_is_not_there_is_named(place, capsys):
    for name in ("./nowhere", "nobody/nothing"):
        assert name in train_line(capsys, "--model_name_or_path", name)


def test_damaged_weights_are_named_by_file(place, capsys):
    shutil.copytree(model_path(), "damaged")
    weights = Path("damaged/model.safetensors")
    whole = weights.read_bytes()
    for cut in (whole[:1000], b"\xff" * 8 + whole[8:]):
        weights.write_bytes(cut)
        line = train_line(capsys, "--model_name_or_path", "damaged")
        assert "damaged/model.safetensors: it is cut off or damaged" in line
    line = told(capsys, "eval", "--models", "damaged", "--datasets", "rows.jsonl", "--num_questions", 1)
    assert "damaged/model.safetensors: it is cut off or damaged" in line


def test_a_prompt_longer_than_the_model_is_named_by_row(place, capsys):
    write_rows("rows.jsonl", [*ROWS, {**ROWS[0], "prompt": [{"role": "user", "content": "1+" * 4000}]}])
    line = train_line(capsys)
    assert "train_dataset row 8" in line and "positions" in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3: x"),
    ],
    ids=["file", "torch"],
)
def test_a_full_disk_is_said_in_words(place, capsys, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", full)
    line = train_line(capsys, "--save_steps=1")
    assert "the disk is full. Free space or choose another output_dir" in line


def test_a_full_disk_that_safetensors_reports_is_no_damaged_file(tmp_path):
    from safetensors import SafetensorError

    told = sentence_of(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert "the disk is full" in told


def test_the_traceback_is_there_for_who_asks(place, capsys):
    assert cli.main(["opsd", "--traceback", "--config", "nowhere.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("trl-opsd opsd: error: --config nowhere.yaml")
    del os.environ[TRACEBACK]


def caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def own_reward():
    raise ValueError("of the user's own code")


@pytest.mark.parametrize(
    "bug",
    [
        lambda: left_pad([], 0),  # max() of nothing, within our own function
        lambda: torch.zeros(2).view(3),
        lambda: TRAINERS["nothing"],
        lambda: __import__("trl_opsd.nothing"),
        own_reward,
    ],
    ids=["builtin", "torch", "key", "import", "reward"],
)
def test_a_bug_is_no_sentence(bug):
    assert sentence_of(caught(bug)) is None


def test_a_check_is_a_sentence_whichever_package_of_ours_or_trls_made_it():
    from trl import GRPOConfig

    assert "max_steps" in sentence_of(caught(lambda: read_command_line(["--max_stepz"], argument_types("opsd"))))
    checked = caught(lambda: GRPOConfig("out", num_generations=1, use_cpu=True, bf16=False))
    assert "at least 2 generations" in sentence_of(checked)


def test_a_bug_keeps_its_traceback(place, monkeypatch):
    monkeypatch.setattr(launch, "train", lambda name, words: left_pad([], 0))
    with pytest.raises(ValueError, match="empty"):
        cli.main(["opsd"])


# One recipe for all methods


def test_keys_that_only_other_methods_read_are_named_once_and_left(place, capsys):
    write_recipe(
        teacher_chat_template_kwargs={"enable_thinking": True},
        steering_strength=2.0,
        num_generations=4,
        max_completion_length=2048,
    )
    words = ["--config", "own.yaml", "--output_dir", "out"]
    for name, unread in {
        "opsd": "steering_strength",
        "grpo": "clip, teacher_chat_template_kwargs, steering_strength",
        "sft": "max_completion_length, clip, teacher_chat_template_kwargs, steering_strength, num_generations",
        "ogls-sd": None,
    }.items():
        _, args, _ = train.parse(name, words)
        assert args.max_steps == 1 and args.chat_template_kwargs == {"enable_thinking": False}
        said = f"own.yaml: {name} does not read {unread}, and leaves them to the methods that do.\n" if unread else ""
        assert capsys.readouterr().out == said


def test_a_typed_word_of_another_method_is_refused_and_a_typo_is_too(place):
    with pytest.raises(UsageError, match="--teacher_prefix is a setting of another method"):
        read_command_line(["--teacher_prefix", "x"], argument_types("grpo"))
    write_recipe(teacher_prefixx="x")
    with pytest.raises(UsageError, match=r"line 11: teacher_prefixx is not known. Did you mean `teacher_prefix`\?"):
        read_command_line(["--config", "own.yaml"], argument_types("grpo"))


def test_the_known_settings_are_those_of_all_parsers():
    for name in (*TRAINERS, *BASELINES):
        assert set(argument_types(name)[1].__dataclass_fields__) - {"ignore_bias_buffers"} <= method_names()


def test_every_recipe_of_the_repository_has_values_of_the_right_kinds():
    root = Path(__file__).parents[2]
    for path in [root / "trl_opsd/demo/opsd.yaml", *(root / "recipes").glob("[A-Z]*/*.yaml")]:
        check_recipe_values(str(path), argument_types(path.stem))


@pytest.mark.slow
def test_two_launched_processes_end_with_one_line_and_code_2(place):
    write_rows("rows.jsonl", [*ROWS[:2], "{\n"])
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = ["opsd", "--config", "own.yaml", "--output_dir", "out", "--dataset_name", "rows.jsonl"]
    words += ["--accelerate_config", "zero2_cpu", "--main_process_port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "trl_opsd.commands.cli", *words],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("trl-opsd opsd: error: rows.jsonl, line 3, column"), done.stderr
    assert "Traceback" not in done.stderr and "Failed to load" not in done.stderr
    assert done.stderr.count("rows.jsonl, line 3") == 1
