# SPDX-License-Identifier: Apache-2.0
"""Every recipe parses, holds only known keys, and runs two steps; the demo goes from data to table, plot and model."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.demo import model_path
from trl_opsd.demo.run import run_demo
from trl_opsd.train import TRAINERS, main, parse

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
RECIPES = [ROOT / "trl_opsd" / "demo" / "opsd.yaml"]
QUICK = [
    "--max_steps=2",
    "--per_device_train_batch_size=4",
    "--max_completion_length=24",
    "--use_cpu=true",
    "--disable_tqdm=true",
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_sets_only_known_fields_and_runs_two_steps(recipe, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1=?"}], "solution": f"{n}+1={n + 1}"} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    names = [f"--model_name_or_path={model_path()}", f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}"]
    arguments = ["--config", str(recipe), *names, *QUICK]
    _, args, _ = parse(recipe.stem, list(arguments))
    for name, value in yaml.safe_load(recipe.read_text()).items():
        if f"--{name}" not in " ".join(QUICK) and name not in (
            "clip",
            "save_strategy",
            "lr_scheduler_type",
            "report_to",
        ):
            assert getattr(args, name) == value, name
    trainer = main(recipe.stem, arguments)
    assert trainer.state.global_step == 2 and isinstance(trainer, TRAINERS[recipe.stem])


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_every_launcher_file(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    engine = path.stem.removesuffix("_cpu")
    kind = {"single": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}[engine]
    assert config.distributed_type.name == kind
    assert config.use_cpu == path.stem.endswith("_cpu")
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(engine[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        known = {field for field in vars(launch_command_parser().parse_args(["script.py"]))}
        assert set(config.fsdp_config) <= known  # what it puts there is not checked when it is read


def test_there_is_a_launcher_file_for_every_engine():
    assert {path.stem for path in LAUNCHERS} == {"single", "ddp", "zero2", "zero3", "fsdp2", "zero2_cpu", "zero3_cpu"}


def test_a_misspelt_key_of_a_recipe_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("divergense: jsd\n")
    with pytest.raises(ValueError, match="divergense"):
        parse("opsd", ["--config", str(recipe), "--output_dir", str(tmp_path), "--use_cpu=true"])


@pytest.mark.slow
def test_the_demo_goes_from_data_to_table_plot_and_loadable_model(tmp_path, capsys):
    summaries = run_demo(str(tmp_path), [0], 8, 2, QUICK)
    printed = capsys.readouterr().out
    assert "gain in avg@2" in printed and "bootstrap interval" in printed
    folder = tmp_path / "seed-0"
    assert (folder / "run.png").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text()) == summaries[0]
    assert "2601.18734" in (folder / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
