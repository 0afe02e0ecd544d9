# SPDX-License-Identifier: Apache-2.0
"""recipes/models/: each file holds what differs for a model, and trains a tiny model of its family for two steps."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trl_opsd.commands import cli
from trl_opsd.commands.arguments import join_recipes
from trl_opsd.commands.train import main, parse
from trl_opsd.demo import model_path
from trl_opsd.errors import UsageError

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted((RECIPES / "models").glob("*.yaml"))
OPSD = RECIPES / "opsd.yaml"
# The families' names in transformers, and what of a tiny one is their own.
FAMILIES = {
    "deepseek-r1-distill-llama-8b": ("llama", {}),
    "deepseek-r1-distill-qwen-1.5b": ("qwen2", {}),
    "gemma-3-1b": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "llama-3.1-8b": ("llama", {}),
    "llama-3.2-3b": ("llama", {"tie_word_embeddings": True}),
    "ministral-8b": ("ministral", {"head_dim": 16}),
    "mistral-7b": ("mistral", {}),
    "olmo-2-1b": ("olmo2", {"max_position_embeddings": 4096}),
    "olmo-3-7b": ("olmo3", {}),
    "phi-4-mini": ("phi3", {"tie_word_embeddings": True}),
    "qwen2.5-7b": ("qwen2", {}),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "smollm3-3b": ("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
}
NEUTRAL = ["--use_cpu=true", "--bf16=false", "--dtype=float32", "--report_to=none", "--use_vllm=false"]


def content_of(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def joined(path, *words, recipe=OPSD):
    return join_recipes(["--config", str(recipe), "--config", str(path), *NEUTRAL, *words])


@pytest.fixture
def places(tmp_path):
    """A function that makes a tiny model of a file's family, and the words that point at it and at some rows."""

    def make(name):
        family, own = FAMILIES[name]
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 32768, "vocab_size": len(tokenizer)}
        tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**sizes, **tokens, **own})).save_pretrained(
            tmp_path / "model"
        )
        tokenizer.save_pretrained(tmp_path / "model")
        rows = [{"problem": f"{n}+1=?", "solution": f"{n}+1={n + 1}, so \\boxed{{{n + 1}}}"} for n in range(16)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        folders = {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": "out"}
        return [f"--{option}={tmp_path / place}" for option, place in folders.items()]

    return make


def test_every_file_has_a_family_and_a_row_of_the_table():
    assert [path.stem for path in FILES] == sorted(FAMILIES)
    table = (RECIPES / "README.md").read_text().split("## Other models\n")[1].split("\n## ")[0]
    for path in FILES:
        (line,) = [line for line in table.splitlines() if f"](models/{path.name})" in line]
        assert f"`{content_of(path)['model_name_or_path']}`" in line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_what_differs_and_makes_the_batch_of_32_on_eight_gpus(path):
    own, recipe = content_of(path), content_of(OPSD)
    same = [name for name, value in own.items() if recipe.get(name) == value]
    assert set(same) <= {"per_device_train_batch_size"}
    assert own["output_dir"] == f"outputs/{own['model_name_or_path'].split('/')[1]}"
    both = {**recipe, **own}
    assert both["per_device_train_batch_size"] * both["gradient_accumulation_steps"] * 8 == 32
    script, args, model_args = parse(
        "opsd", joined(path, f"--gradient_accumulation_steps={8 * both['gradient_accumulation_steps']}")
    )
    for name in own.keys() - {"gradient_accumulation_steps"}:
        (arrived,) = {repr(getattr(part, name)) for part in (script, args, model_args) if hasattr(part, name)}
        assert arrived == repr(own[name]), name
    assert args.max_completion_length == recipe["max_completion_length"] and model_args.lora_r == recipe["lora_r"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`layer_types`:FutureWarning")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tiny_model_of_the_family_trains_two_steps(path, places):
    short = [
        "--max_steps=2",
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=1",
        "--max_completion_length=8",
    ]
    trainer = main(
        "opsd", joined(path, *short, "--lora_r=2", "--disable_tqdm=true", "--log_completions=false", *places(path.stem))
    )
    assert trainer.state.global_step == 2
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    wanted = {**content_of(OPSD), **content_of(path)}["lora_target_modules"]
    assert {target for target in wanted if any(f".{target}.lora_" in name for name in trained)} == set(wanted)
    assert trainer.teacher.adapter_off and all("lora_" in name for name in trained)
    assert not getattr(trainer, "aux_loss_enabled", False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-30b-a3b"])
def test_the_planner_counts_a_model_of_the_family(name, places, capsys):
    words = ["plan", "--method=opsd", "--config", str(OPSD), "--config", str(RECIPES / "models" / f"{name}.yaml")]
    words.append(places(name)[0])
    assert cli.main(words) == 0
    assert "| always | weights |" in capsys.readouterr().out
    assert cli.main([*words, "--load_in_4bit=true"]) == 2
    assert "load_in_4bit=True: the planner counts weights of `dtype` alone" in capsys.readouterr().err


def test_of_several_recipes_a_later_ones_key_wins_and_words_win_over_all(tmp_path):
    for name, text in (("a", "lora_r: 1\nlora_alpha: 2\n"), ("b", "lora_r: 3\n"), ("c", "seed: 4\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [str(tmp_path / f"{name}.yaml") for name in "abc"]
    words = join_recipes(
        ["opsd", "--config", files[0], "--lora_alpha", "5", f"--config={files[1]}", "--config", files[2]]
    )
    assert words[:2] == ["opsd", "--config"] and words[3:] == ["--lora_alpha", "5"]
    assert yaml.safe_load(Path(words[2]).read_text()) == {"lora_r": 3, "lora_alpha": 2, "seed": 4}
    assert join_recipes(["--config", files[0], "--seed", "1"]) == ["--config", files[0], "--seed", "1"]
    with pytest.raises(UsageError, match=r"nowhere\.yaml: no such file"):
        join_recipes(["--config", files[0], "--config", "nowhere.yaml"])


def test_an_error_of_joined_recipes_names_both_files(tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("lora_r: many\n")
    words = ["dry-run", "opsd", "--config", str(OPSD), "--config", str(tmp_path / "wrong.yaml"), *NEUTRAL]
    assert cli.main(words) == 2
    assert "opsd+wrong.yaml, line" in capsys.readouterr().err
