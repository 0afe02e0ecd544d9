# SPDX-License-Identifier: Apache-2.0
"""The command line: words go to the trainer, the launcher or nobody; help is complete and quick; commands are a table."""

import json
import os
import resource
import socket
import subprocess
import sys
from dataclasses import MISSING
from importlib import import_module
from pathlib import Path

import pytest

from trl_opsd.commands import cli, launch
from trl_opsd.commands.arguments import nearest_name, read_command_line, split_options
from trl_opsd.commands.help_text import training_help
from trl_opsd.commands.train import TRAINERS, argument_types, make_parser, parse
from trl_opsd.errors import UsageError
from trl_opsd.inspect.run import InspectArguments
from trl_opsd.trainers.baselines import BASELINES

ROOT = Path(__file__).parents[2]


def read(words, name="opsd"):
    return read_command_line(words, argument_types(name))


def test_every_command_leads_to_a_function_of_its_words():
    for _, place in cli.COMMANDS.values():
        module, function = place.split(":")
        assert callable(getattr(import_module(f"trl_opsd.{module}"), function))


def test_the_written_out_names_are_those_of_the_baselines():
    assert set(cli.BASELINES) == set(BASELINES)
    assert {*TRAINERS, *BASELINES} < set(cli.COMMANDS)


ADDED_PAGE = """
import sys
from dataclasses import dataclass
from types import ModuleType

from trl_opsd import pages

pages.PAGES["longer-opsd"] = pages.Page("LongerOPSD", "OPSD of longer rollouts")
sys.modules["trl_opsd.settings.longer_opsd"] = settings = ModuleType("settings")
sys.modules["trl_opsd.trainers.longer_opsd"] = trainers = ModuleType("trainers")

from trl_opsd.settings.fields import option, require


@dataclass
class LongerOPSDSettings:
    extra_length: int = option(7, "How much longer.")

    def check(self):
        require(self.extra_length > 0, self, "extra_length", "1 or more")


settings.LongerOPSDSettings = LongerOPSDSettings

import importlib

import trl_opsd
from trl_opsd.commands import cli

importlib.reload(trl_opsd)  # it was imported before its table had the page
assert cli.main(["longer-opsd", "--help"]) == 0 and cli.main([]) == 0
try:
    cli.main(["plan", "--help", "--method", "longer-opsd"])
except SystemExit:
    pass
assert "torch" not in sys.modules

from trl_opsd import OPSDConfig, OPSDTrainer


@dataclass
class LongerOPSDConfig(LongerOPSDSettings, OPSDConfig):
    pass


class LongerOPSDTrainer(OPSDTrainer):
    config_class = LongerOPSDConfig


trainers.LongerOPSDConfig, trainers.LongerOPSDTrainer = LongerOPSDConfig, LongerOPSDTrainer
assert trl_opsd.LongerOPSDConfig is LongerOPSDConfig and "LongerOPSDTrainer" in trl_opsd.__all__

from trl_opsd.commands import arguments, train

words = ["--output_dir=x", "--use_cpu=true", "--bf16=false", "--extra_length"]
assert train.parse("longer-opsd", [*words, "9"])[1].extra_length == 9
assert "extra_length" in arguments.method_names() and train.TRAINERS["longer-opsd"] is LongerOPSDTrainer
cli.main(["longer-opsd", *words, "0"])
"""


def test_a_line_of_the_table_makes_a_page_a_command_with_help_a_trainer_and_public_names(tmp_path):
    done = subprocess.run([sys.executable, "-c", ADDED_PAGE], cwd=tmp_path, capture_output=True, text=True)
    assert "trl-opsd longer-opsd: error: extra_length=0 is not valid; set it to 1 or more." in done.stderr, done.stderr
    own_help, overview = done.stdout.split("usage: trl-opsd COMMAND")
    assert "--extra_length" in own_help and "(default: 7)" in own_help and "--clip_value" in own_help
    assert "longer-opsd    train: OPSD of longer rollouts" in overview and "--extra_length" in overview


def test_help_shows_a_long_default_shortened_and_never_the_name_of_a_constant():
    text = training_help("opsd")
    assert "TEMPLATE" not in text and "(default: '{prompt}" in text
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize(
    "words",
    [["--help"], [], ["purified-opsd", "-h"], *([name, "--help"] for name in cli.COMMANDS if name != "env")],
    ids=" ".join,
)
def test_help_needs_neither_torch_nor_trl(words):
    code = f"import sys; from trl_opsd.commands.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += "print('LOADED', [m for m in ('torch', 'trl', 'accelerate', 'transformers') if m in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.endswith("LOADED []\n") and "usage: trl-opsd" in output
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


@pytest.mark.parametrize("name", [*TRAINERS, *BASELINES])
def test_help_lists_every_setting_of_ours_and_names_settings_that_exist(name):
    text = training_help(name)
    listed = {word[2:] for line in text.splitlines() if (word := line.strip().split(" ")[0]).startswith("--")}
    fields = {field for kind in argument_types(name) for field in kind.__dataclass_fields__}
    launcher = {"config", "accelerate_config", "num_processes", "help_all"}
    assert listed - launcher <= fields
    if name in TRAINERS:
        from trl import GRPOConfig

        own = set(TRAINERS[name].config_class.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
        assert own <= listed
    assert {"dataset_name", "dataset_format", "problem_column", "solution_column", "prompt_template"} <= listed


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["plan", "--method=ogls-sd"], {"num_gpus", "gpu_gib", "precision", "steering_strength"}),
        (["dry-run", "purified-opsd"], {"rows", "tanh_bound"}),
        (["inspect"], {"method", "student_model_name_or_path", "completions", "num_rollouts", "output"}),
    ],
)
def test_help_of_a_command_that_takes_training_settings_lists_them(capsys, words, own):
    assert cli.main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    listed = {word[2:] for line in text.splitlines() if (word := line.strip().split(" ")[0]).startswith("--")}
    method = max((name for name in TRAINERS if name in " ".join(words)), key=len, default="opsd")
    settings = {field for kind in argument_types(method) for field in kind.__dataclass_fields__}
    assert {*own, "model_name_or_path", "dataset_name", "divergence", "clip"} <= listed
    wrappers = {"help", "num_gpus", "gpu_gib", "precision", "prompt_tokens", "solution_tokens", "write-docs", "rows"}
    if words == ["inspect"]:
        settings |= set(InspectArguments.__dataclass_fields__)
    assert listed - settings - wrappers - {"accelerate_config", "method"} == set()


@pytest.mark.parametrize("name", TRAINERS)
def test_help_shows_the_defaults_that_the_config_has(name):
    import re

    config, checked = TRAINERS[name].config_class, set()
    for field, default in re.findall(
        r"  --(\w+)\s(?:(?!  --).)*?\(default:\s+([^()\s]+)\)", training_help(name), re.DOTALL
    ):
        known = config.__dataclass_fields__.get(field)
        if known is not None and known.default is not MISSING:
            assert default == repr(known.default), field
            checked.add(field)
    assert {"clip", "divergence", "max_completion_length", "max_steps", "guard"} <= checked


def test_help_all_lists_the_fields_of_trl_too(capsys):
    assert cli.main(["opsd", "--help_all"]) == 0
    text = capsys.readouterr().out
    assert "--vllm_gpu_memory_utilization" in text and "--lora_dropout" in text and "--clip_value" in text


def test_options_are_split_with_their_values():
    assert split_options(["--a", "1", "2", "--b=-3", "--config=x.yaml", "--c-d", "-4"]) == [
        ("a", ["--a", "1", "2"]),
        ("b", ["--b=-3"]),
        ("config", ["--config", "x.yaml"]),
        ("c_d", ["--c-d", "-4"]),
    ]
    with pytest.raises(UsageError, match=r"'recipe\.yaml' belongs to no option"):
        split_options(["recipe.yaml", "--a"])


def test_words_of_the_launcher_and_of_the_trainer_are_told_apart():
    line = read(["--num_processes", "4", "--learning_rate", "1e-5", "--accelerate_config=zero3", "--use_cpu"])
    assert line.own == ["--learning_rate", "1e-5", "--use_cpu"]
    assert line.launcher == ["--num_processes", "4", "--accelerate_config=zero3"]


def test_keys_of_the_launcher_may_stand_in_a_recipe_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("clip: none\naccelerate_config: zero2\nmulti_gpu: true\nmachine_rank: 0\nenv: {A: 1}\n")
    line = read(["--config", str(recipe), "--accelerate_config", "zero3"])
    assert line.launcher == [
        *("--accelerate_config", "zero2", "--multi_gpu", "--machine_rank", "0"),
        *("--accelerate_config", "zero3"),
    ]
    words = launch.launch_words("opsd", line)
    configs = [Path(words[i + 1]).stem for i, word in enumerate(words) if word == "--config_file"]
    assert configs == ["zero2", "zero3"]  # argparse keeps the last
    settings = ["--config", str(recipe), "--use_cpu=true", "--bf16=false", f"--output_dir={tmp_path}"]
    assert parse("opsd", settings)[1].clip is None


def test_what_a_recipe_sets_in_the_environment_is_printed_once_and_no_secret_is(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "env: {PATH: /opt/strange, LD_PRELOAD: x.so, HF_TOKEN: hf_abc, N: 3}\nuse_cpu: true\nbf16: false\n"
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))  # TRL's parser writes into it
    words = ["--config", str(recipe), f"--output_dir={tmp_path}"]
    parse("opsd", words)
    assert os.environ["PATH"] == "/opt/strange"
    assert capsys.readouterr().err == (
        "The recipe's `env` sets PATH='/opt/strange', LD_PRELOAD='x.so', HF_TOKEN=(hidden), N='3' for this process and "
        "every program that it starts.\n"
    )
    os.environ["RANK"] = "1"
    parse("opsd", words)
    recipe.write_text("use_cpu: true\nbf16: false\n")
    os.environ["RANK"] = "0"
    parse("opsd", words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], r"--learning_rat is not known. Did you mean `learning_rate`\?"),
        (["--teacher-prefx", "x"], r"--teacher-prefx is not known. Did you mean `teacher_prefix`\?"),
        (["--num_proceses", "2"], r"Did you mean `num_processes`\?"),
        (["--zzzzzzzzzz"], r"--zzzzzzzzzz is not known. `--help`"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_a_word_that_nobody_knows_is_refused_with_the_nearest_name(words, message):
    with pytest.raises(UsageError, match=message):
        read(words)


def test_an_abbreviation_is_refused_and_not_guessed():
    with pytest.raises(UsageError, match="learning_ra is not known"):
        parse("opsd", ["--learning_ra", "1"])
    assert not make_parser("opsd").allow_abbrev


def test_no_name_is_suggested_where_none_is_near():
    assert nearest_name("qqqq", ["clip", "divergence"]) is None


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("- clip\n")
    with pytest.raises(UsageError, match="holds a list"):
        read(["--config", str(recipe)])


def test_usage_errors_end_the_command_with_one_line_and_code_2(capsys):
    assert cli.main(["opsd", "--divergense", "jsd"]) == 2
    assert cli.main(["ospd"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("trl-opsd opsd: error: --divergense is not known. Did you mean `divergence`?")
    assert lines[1].startswith("trl-opsd ospd: error: no such command. Did you mean `opsd`?") and len(lines) == 2


@pytest.mark.parametrize("name", ["zero2_cpu", "zero3_cpu"])
def test_accelerate_configs_of_the_repository_are_found_by_name_inside_the_package(name):
    path = Path(launch.accelerate_config_path(name))
    assert path.parent == ROOT / "trl_opsd" / "accelerate_configs"
    assert path.read_text() == (ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text()


def test_an_accelerate_config_may_be_a_path_or_a_name_of_trl_but_not_unknown(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("num_processes: 1\n")
    assert launch.accelerate_config_path(str(own)) == str(own)
    assert launch.accelerate_config_path("zero1").endswith("zero1.yaml")  # only TRL has it
    with pytest.raises(UsageError, match=r"zero9: neither a file nor one of .*zero3_cpu"):
        launch.accelerate_config_path("zero9")


def test_launcher_options_start_accelerate_with_the_trainers_words_behind_the_module(monkeypatch):
    from accelerate.commands import launch as accelerate_launch

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launched = []
    monkeypatch.setattr(accelerate_launch, "launch_command", launched.append)
    assert cli.main(["ogls-sd", "--accelerate_config", "zero3_cpu", "--num_processes", "3", "--max_steps", "1"]) == 0
    (arguments,) = launched
    assert arguments.module and arguments.training_script == "trl_opsd.commands.train"
    assert arguments.training_script_args == ["ogls-sd", "--max_steps", "1"]
    assert arguments.num_processes == 3 and arguments.config_file.endswith("zero3_cpu.yaml")


def test_without_launcher_options_training_runs_in_this_process(monkeypatch):
    called = []
    monkeypatch.setattr(launch, "train", lambda name, words: called.append((name, words)))
    cli.main(["opsd", "--max_steps", "1"])
    assert called == [("opsd", ["--max_steps", "1"])]


def test_a_launched_process_does_not_launch_again(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["opsd", "--num_processes", "2"]) == 2
    assert "launched already" in capsys.readouterr().err


def test_env_prints_what_a_report_needs(capsys):
    from importlib.metadata import version

    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for package in ("torch", "trl", "transformers", "accelerate", "peft", "math-verify"):
        assert f"- {package}: {version(package)}" in text
    for name in ("platform", "python", "trl_opsd", "deepspeed", "vllm", "accelerators"):
        assert f"- {name}: " in text


def test_demo_options_are_explained_without_running(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    assert "held-out problems" in capsys.readouterr().out


def test_a_misspelt_override_of_the_demo_is_refused_before_anything_is_measured(capsys):
    assert cli.main(["demo", "--max_stepz", "3"]) == 2
    assert "Did you mean `max_steps`?" in capsys.readouterr().err


def write_run(folder):
    from trl_opsd.demo import build_rows, model_path

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in build_rows("train", 8)))
    recipe = folder / "recipe.yaml"
    settings = ["max_steps: 1", "per_device_train_batch_size: 2", "gradient_accumulation_steps: 1", "save_steps: 1"]
    settings += ["max_completion_length: 8", "report_to: none", "bf16: false", "chat_template_kwargs: null"]
    recipe.write_text("\n".join([*settings, f"model_name_or_path: {model_path()}", f"dataset_name: {data}"]))
    return ["opsd", "--config", str(recipe), f"--output_dir={folder / 'out'}"]


def run_command(words, **environment):
    command = [sys.executable, "-m", "trl_opsd.commands.cli", *words]
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    # DeepSpeed builds its CPU operators with the environment's ninja.
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_config_of_one_process_trains_through_accelerate(tmp_path):
    config = tmp_path / "one.yaml"
    config.write_text('distributed_type: "NO"\nuse_cpu: true\nnum_processes: 1\nmixed_precision: "no"\n')
    run_command([*write_run(tmp_path), "--use_cpu=true", "--accelerate_config", str(config)])
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.slow
def test_a_named_config_trains_on_two_processes_under_zero_3(tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    launcher = ["--accelerate_config", "zero3_cpu", "--main_process_port", port]
    words = [*write_run(tmp_path), "--use_cpu=true", "--gradient_checkpointing=false", *launcher]
    run_command(words, DS_ACCELERATOR="cpu")
    names = {path.name for path in (tmp_path / "out" / "checkpoint-1").rglob("*.pt")}
    # Files that only a partitioned model writes, one a process.
    assert {"zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"} <= names
