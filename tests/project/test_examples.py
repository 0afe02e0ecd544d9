# SPDX-License-Identifier: Apache-2.0
"""The example script and the command line on a user's own things: a local model folder and a local file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]

SETTINGS = [
    "--max_steps=2",
    "--per_device_train_batch_size=2",
    "--gradient_accumulation_steps=2",
    "--max_completion_length=8",
    "--bf16=false",
    "--use_cpu=true",
    "--report_to=none",
    "--logging_steps=1",
    "--save_steps=1",
]


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    """A model folder as a user would have it."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from trl_opsd.demo.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder, suffix):
    rows = [{"problem": f"{n}+{n}=?", "answer": f"{n}+{n} is \\boxed{{{2 * n}}}"} for n in range(8)]
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def steps_of(folder):
    """Optimizer steps of a finished run, and that each of them logged a loss."""
    state = json.loads(max(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    assert sum("loss" in entry for entry in state["log_history"]) == state["global_step"]
    return state["global_step"]


def run(command, folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CI": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_example_trains_on_a_local_folder_and_file(tmp_path, local_model, suffix):
    data = write_rows(tmp_path, suffix)
    lora = ["--use_peft", "--lora_r=4"] if suffix == ".jsonl" else []
    names = ["--problem_column=problem", "--solution_column=answer"]
    model = [f"--model_name_or_path={local_model}", f"--dataset_name={data}", "--output_dir=out"]
    run([sys.executable, str(ROOT / "examples" / "opsd.py"), *model, *names, *SETTINGS, *lora], tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2601.18734" in card and "Reference solution begins" in card
    assert (tmp_path / "out" / "checkpoint-1").is_dir() and steps_of(tmp_path / "out") == 2
    if lora:
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_method_of_ones_own_trains_without_touching_the_package(tmp_path):
    output = run([sys.executable, str(ROOT / "examples" / "own_method.py")], tmp_path)
    assert "'divergence'" in output and "2/2" in output


@pytest.mark.slow
def test_the_example_of_tools_runs_them_and_shows_what_they_said(tmp_path):
    output = run([sys.executable, str(ROOT / "examples" / "tools.py")], tmp_path)
    assert "'tools/call_frequency': '1'" in output and "2/2" in output
    assert "[calls run_python with" in output and "tool run_python: SyntaxError: '(' was never closed" in output
    assert "'rows/used': '0.5'" in output  # those whose environment reported; no rollout is right


@pytest.mark.slow
def test_the_command_line_takes_a_recipe_and_overrides(tmp_path, local_model):
    data = write_rows(tmp_path, ".jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_name: {data}\nproblem_column: problem\nsolution_column: answer\nclip: none\n")
    command = [str(Path(sys.executable).parent / "trl-opsd"), "opsd", "--config", str(recipe)]
    run([*command, f"--model_name_or_path={local_model}", "--output_dir=out", *SETTINGS], tmp_path)
    assert "| `clip` | None |" in (tmp_path / "out" / "README.md").read_text()
    assert steps_of(tmp_path / "out") == 2


def test_the_command_line_helps_without_torch():
    code = "import sys; from trl_opsd.commands.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_named_column_that_is_missing_is_refused(tmp_path):
    from trl_opsd.commands.train import DataArguments, load_rows

    data = write_rows(tmp_path, ".jsonl")
    with pytest.raises(ValueError, match="solution_column='gold' is not a column"):
        load_rows(DataArguments(dataset_name=str(data), solution_column="gold"), "train")
    with pytest.raises(ValueError, match="dataset_name is not set"):
        load_rows(DataArguments(), "train")
