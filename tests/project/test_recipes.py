# SPDX-License-Identifier: Apache-2.0
"""Every recipe parses, holds only known keys, and runs two steps; the demo goes from data to table, plot and model."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.commands.train import TRAINERS, main, parse
from trl_opsd.demo import model_path
from trl_opsd.demo.run import run_demo
from trl_opsd.errors import UsageError
from trl_opsd.pages import PAGES, settings_of
from trl_opsd.trainers.baselines import BASELINES

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# Rollouts of a step where it is not 32; these recipes stand in no line of the table of sizes but the first.
LARGE = {
    **dict.fromkeys(("sdpo", "mopd", "antisd", "trace", "ssopd", "rlsd", "rlrt", "dasd", "stableopd", "vpd"), 256),
    "brts": 128,
    "demopsd": 512,
    "vopd": 64,
    "msd": 16,
}
ALL_RECIPES = [ROOT / "trl_opsd" / "demo" / "opsd.yaml", *RECIPES]
NEUTRAL = ["--use_cpu=true", "--bf16=false", "--dtype=float32", "--report_to=none"]
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
QUICK = [
    *NEUTRAL,
    "--max_steps=2",
    "--per_device_train_batch_size=8",
    "--gradient_accumulation_steps=1",
    "--disable_tqdm=true",
]


def name_of(path):
    return f"{path.parent.name}-{path.stem}"


def recipe_of(path):
    return yaml.safe_load(path.read_text())


def quick_arguments(path):
    """Overrides that leave the method's and the group's settings as the recipe has them."""
    if path.stem == "sft":
        return [*QUICK, "--max_length=256"]
    short = [*QUICK, "--max_completion_length=12", "--use_vllm=false", "--log_completions=false"]
    lengths = {"ogls-sd": ["--distillation_length=8"], "popd": ["--distillation_length=4..8 in 2"]}
    return [*short, *lengths.get(path.stem, [])]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A Qwen3 of a few thousand parameters as a folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def places(tmp_path, tiny_model):
    """A data file with every column the recipes name, and the arguments that point at it."""
    data = tmp_path / "rows.jsonl"
    rows = [{"problem": f"{n}+1=?", "solution": f"{n}+1={n + 1}, so \\boxed{{{n + 1}}}"} for n in range(16)]
    own = {
        "skills": ["Count on.", "Check the sum."],
        "skill_scores": [1.0, 0.5],
        "rubric": ["adds"],
        "critique": "1 more than it is right.",
        "translation": "Add 1.",
        "spans": [{"start": 0, "end": 1, "kind": "E", "type": "a slip"}],
        "plan": "Count on.",
    }
    data.write_text("\n".join(json.dumps(row | own) for row in rows))
    return [
        f"--model_name_or_path={tiny_model}",
        f"--dataset_name={data}",
        "--problem_column=problem",
        f"--output_dir={tmp_path / 'out'}",
    ]


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


@pytest.mark.parametrize("path", ALL_RECIPES, ids=name_of)
def test_a_recipe_sets_only_known_fields_and_each_arrives(path, tmp_path):
    # One process in place of eight.
    one = ["--gradient_accumulation_steps=8"] if path in RECIPES else []
    parsed = parse(path.stem, ["--config", str(path), *NEUTRAL, *one, f"--output_dir={tmp_path}"])
    overridden = {"gradient_accumulation_steps", "bf16", "dtype", "report_to", "output_dir", "gradient_checkpointing"}
    for name, value in recipe_of(path).items():
        if name in overridden:
            continue
        (arrived,) = {repr(getattr(part, name)) for part in parsed if hasattr(part, name)}
        expected = None if name == "clip" and value == "none" else value
        assert arrived in (repr(expected), f"<SchedulerType.{str(value).upper()}: '{value}'>") or (
            name == "save_strategy" and "'no'" in arrived
        ), name


def sizes():
    """(model, method, words) of every line of the README's table of sizes; `sft` without vLLM's share, as the text says."""
    table = (ROOT / "recipes" / "README.md").read_text().split("## Sizes\n")[1].split("\n## ")[0]
    for model, methods, cell in re.findall(
        r"^\| ([\w.-]+) \| ([\w-]+) \| (?:`(--.*)`|none) \|$", table, flags=re.MULTILINE
    ):
        for path in RECIPES:
            if methods == path.stem or (methods == "all" and path.stem not in LARGE):
                words = cell.replace("METHOD", path.stem).split()
                place = words.index("--vllm_gpu_memory_utilization") if words and path.stem == "sft" else len(words)
                yield model, path.stem, words[:place] + words[place + 2 :]


SIZES = list(sizes())


def test_every_model_and_method_that_was_promised_has_its_words():
    assert {path.stem for path in RECIPES} == {*PAGES, *BASELINES}
    found = {(model, method) for model, method, _ in SIZES}
    for size in ("1.7B", "4B", "8B"):
        assert {(f"Qwen3-{size}", path.stem) for path in RECIPES if path.stem not in LARGE} <= found
    assert {each for each in found if not each[0].startswith("Qwen3")} == {
        ("DeepSeek-R1-Distill-Qwen-7B", "purified-opsd"),
        ("Olmo-3-7B-Think", "purified-opsd"),
    }
    assert "not run here" in (ROOT / "recipes" / "README.md").read_text()


@pytest.mark.parametrize(("model", "method", "words"), SIZES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_sizes_words_are_read_and_make_the_papers_batch_of_32_on_eight_gpus(model, method, words):
    given = dict(zip(words[::2], words[1::2], strict=True))
    recipe = recipe_of(ROOT / "recipes" / f"{method}.yaml")
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    micro, steps = (int(given.get(f"--{name}", recipe[name])) for name in sizes)
    assert micro * steps * 8 == 32 and 32 % recipe.get("num_generations", 1) == 0
    path = str(ROOT / "recipes" / f"{method}.yaml")
    _, args, model_args = parse(
        method, ["--config", path, *words, *NEUTRAL, f"--gradient_accumulation_steps={steps * 8}"]
    )
    assert model_args.model_name_or_path.split("/")[1] == model
    assert args.output_dir == f"outputs/{model}-{method}"
    if "--chat_template_kwargs" in given:
        assert args.chat_template_kwargs == args.teacher_chat_template_kwargs == {}


@pytest.mark.parametrize(("method", "rollouts"), LARGE.items())
def test_a_recipe_of_a_large_batch_makes_it_on_eight_gpus(method, rollouts):
    recipe = recipe_of(ROOT / "recipes" / f"{method}.yaml")
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * 8 == rollouts
    assert rollouts % recipe["num_generations"] == 0


# What the papers print (their pages in docs/methods/), beside what every recipe has.
PAPERS = {
    "opsd": {
        "divergence": "forward_kl",
        "clip": "upper",
        "clip_value": 0.05,
        "num_generations": 1,
        "max_completion_length": 1024,
    },
    "ogls-sd": {
        "clip": "symmetric",
        "clip_value": 0.05,
        "num_generations": 8,
        "max_completion_length": 8192,
        "distillation_length": 1024,
        "steering_strength": 3.0,
    },
    "purified-opsd": {
        "divergence": "jsd",
        "clip": "none",
        "tanh_bound": 10.0,
        "conservativeness": 1.0,
        "max_steps": 200,
        "max_completion_length": 1024,
    },
    "egrsd": {"num_generations": 1, "max_completion_length": 1024, "entropy_gate_floor": 0.1},
    "pbsd": {"num_generations": 1},
}
OTHER_PAPERS = {  # which share less with OPSD
    "sdft": {
        "divergence": "forward_kl",
        "num_loss_tokens_to_skip": 3,
        "learning_rate": 2e-5,
        "max_completion_length": 1024,
    },
    "mopd": {"max_right_peers": 2, "max_wrong_peers": 1, "max_completion_length": 4096, "learning_rate": 1e-5},
    "resd": {
        "divergence": "reverse_kl",
        "target_share_floor": 0.2,
        "teacher_update_rate": 1e-4,
        "learning_rate": 1e-6,
        "max_playbook_lessons": 200,
    },
    "sdpo": {"divergence": "jsd", "support_size": 100, "teacher_update_rate": 0.05, "learning_rate": 1e-5},
    "vpd": {"divergence": "reverse_kl", "maximization_steps": 5, "reward_beta": 0.1, "teacher_model_kind": "live"},
    "demopsd": {"divergence": "reverse_kl", "support_size": 100, "largest_plain_share": 0.15, "num_generations": 8},
    "antisd": {"ascent_strength": 0.5, "gate_closes_below": 0.93, "max_completion_length": 32768, "max_steps": 200},
    "sgsd": {"max_skills": 8, "support_clip": 3.0, "support_threshold": 0.05, "max_steps": 200, "temperature": 1.1},
    "trace": {
        "span_weight": 0.5,
        "span_hold_steps": 10,
        "max_span_share": 0.25,
        "epsilon_high": 0.28,
        "clip_value": 0.05,
    },
    "ssopd": {"frontier_strength": 0.5, "teacher_model_kind": "base"},
    "msd": {"divergence": "reverse_kl", "critical_top_k": 32, "teacher_model_kind": "base"},
    "critique": {"divergence": "forward_kl", "clip": "none"},
    "rcsd": {"support_size": 20, "clip_value": 0.05, "temperature": 1.2, "max_completion_length": 4096, "lora_r": 64},
    "vopd": {
        "learning_rate": 1e-5,
        "lora_r": 64,
        "lora_alpha": 128,
        "max_completion_length": 2048,
        "num_generations": 1,
    },
    "rethinking-opd": {"support_size": 16, "delta": 3.0, "num_generations": 4, "max_completion_length": 7168},
    "rlsd": {"evidence_strength": 0.5, "evidence_bound": 0.2, "evidence_steps": 60, "teacher_model_kind": "base"},
    "rlrt": {"evidence_bound": 0.5, "epsilon_high": 0.28, "max_completion_length": 20480, "num_generations": 8},
    "dasd": {"pulled_share": 0.2, "num_generations": 8},
    "brts": {"num_candidates": 2, "candidate_weight": 10.0, "support_size": 16, "candidate_temperature": 0.7},
    "stableopd": {"golden_weight": 0.1, "reference_weight": 0.01, "num_generations": 4, "learning_rate": 1e-6},
}
SHARED = {"lora_r": 64, "lora_alpha": 128, "learning_rate": 5e-6, "temperature": 1.1, "teacher_model_kind": "base"}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in PAPERS | OTHER_PAPERS], ids=name_of)
def test_a_recipe_has_the_papers_setting(path):
    recipe = recipe_of(path)
    expected = OTHER_PAPERS.get(path.stem) or {**SHARED, **PAPERS[path.stem]}
    for name, value in expected.items():
        assert recipe[name] == value, name


# What a recipe sets beside the method's defaults; `loss_temperature` None is the sampling temperature, which the first ones write.
BESIDE_OF = {
    "sort": {"max_completion_length"},  # as the baseline GRPO's
    "critique": {"write_critique"},  # there is no other critic in a recipe
    "resd": {"engine_weight_cap"},  # biased under top-p before TRL 1.17
    "trace": {"distilled_spans", "divergence"},  # the paper's for a base of this size
}
BESIDE = {"gradient_accumulation_steps", "prompt_template", "max_teacher_prompt_length", "loss_temperature"}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in PAGES], ids=name_of)
def test_a_recipe_is_its_methods_defaults_but_for_batch_and_prompts(path):
    defaults = {**vars(settings_of("opsd")()), **vars(settings_of(path.stem)())}
    beside = BESIDE | ({"per_device_train_batch_size"} if path.stem in LARGE else set())
    beside |= BESIDE_OF.get(path.stem, set())
    given = {name: None if value == "none" else value for name, value in recipe_of(path).items()}
    differing = {name for name in given.keys() & defaults.keys() if given[name] != defaults[name]}
    assert differing <= beside


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is experimental")  # which pages of experimental/ say
@pytest.mark.parametrize("path", ALL_RECIPES, ids=name_of)
def test_a_recipe_runs_two_steps(path, places):
    trainer = main(path.stem, ["--config", str(path), *places, *quick_arguments(path)])
    expected = TRAINERS[path.stem] if path.stem in TRAINERS else BASELINES[path.stem][0]
    assert type(trainer) is expected and trainer.state.global_step == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 or path.parent.name == "demo"
    assert trainer.args.per_device_train_batch_size == 8
    assert getattr(trainer.args, "num_generations", 1) == recipe_of(path).get("num_generations", 1)


def test_a_misspelt_key_of_a_recipe_is_refused_with_the_nearest_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("divergense: jsd\n")
    with pytest.raises(UsageError, match=r"divergense is not known. Did you mean `divergence`\?"):
        parse("opsd", ["--config", str(recipe), "--output_dir", str(tmp_path), "--use_cpu=true"])


@pytest.mark.slow
def test_the_demo_goes_from_data_to_table_plot_and_loadable_model(tmp_path, capsys):
    quick = ["--max_steps=2", "--per_device_train_batch_size=4", "--max_completion_length=24", "--disable_tqdm=true"]
    summaries = run_demo(str(tmp_path), [0], 8, 2, ["--use_cpu=true", *quick])
    printed = capsys.readouterr().out
    assert "gain in avg@2" in printed and "bootstrap interval" in printed
    folder = tmp_path / "seed-0"
    assert (folder / "run.png").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text()) == summaries[0]
    card = (folder / "README.md").read_text()
    assert "2601.18734" in card and f"{summaries[0]['base']['avg']:.3f}" in card and '"evaluation": "off"' in card
    assert "Licence of the base: apache-2.0" in card and str(tmp_path) not in card
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
