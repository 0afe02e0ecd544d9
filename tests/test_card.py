# SPDX-License-Identifier: Apache-2.0
"""The model card tells what it knows, says what was not measured, and holds nothing of the machine or of a token."""

import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import yaml
from peft import LoraConfig

from trl_opsd import OGLSSDConfig, OPSDConfig, OPSDTrainer, PurifiedOPSDConfig
from trl_opsd.card import add_results, results_section
from trl_opsd.card.facts import describe_hardware
from trl_opsd.card.sections import settings_section

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
BASE = {"dataset": "sums", "model": "base", "num_questions": 5, "num_samples": 2, "avg_at_k": 0.125}
TRAINED = {**BASE, "model": "trained", "avg_at_k": 0.625, "difference": (0.5, 0.25, 0.75)}


@pytest.fixture
def build(make_model, make_args, tokenizer, dataset):
    def build(model=None, peft_config=None, **settings):
        return OPSDTrainer(
            model=model or make_model(),
            args=make_args(**settings),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return build


def read_card(tmp_path):
    """Metadata and text."""
    _, metadata, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def section(text, heading):
    return re.search(rf"## {heading}\n(.*?)(?=\n## |\Z)", text, re.DOTALL).group(1)


def test_a_card_of_a_run_without_numbers_says_so_and_names_no_path_and_no_token(build, tmp_path):
    text_with_token = "{prompt} " + TOKEN + " ``` {solution}"
    trainer = build(teacher_prompt_template=text_with_token, hub_token="other-secret", teacher_prefix="other-secret")
    trainer.create_model_card(model_name="tiny")
    metadata, text = read_card(tmp_path)
    assert metadata["pipeline_tag"] == "text-generation" and "licence" not in metadata and "license" not in metadata
    assert "Not measured" in section(text, "Results") and '"evaluation": "not measured"' in text
    assert "No curves" in text and "made in memory" in text and "Optimizer steps: 0" in text
    assert "not stated" in section(text, "Licence") and "Not named" in section(text, "Data")
    assert "8 rows, columns `prompt`, `solution`" in section(text, "Data")
    assert str(tmp_path) not in text and TOKEN not in text and "other-secret" not in text
    assert "````text\n{prompt} hf_***" in text  # the fence is longer than any in the template


def test_numbers_of_other_weights_are_not_shown(build, tmp_path):
    trainer = build()
    trainer.create_model_card(evaluation=[BASE, TRAINED], dataset_name="tester/sums")
    assert "0.625" in section(read_card(tmp_path)[1], "Results")
    trainer.create_model_card()
    assert "0.625" in section(read_card(tmp_path)[1], "Results")
    trainer.state.global_step = 5
    trainer.create_model_card()
    metadata, text = read_card(tmp_path)
    assert "Not measured" in section(text, "Results")
    assert metadata["datasets"] == "tester/sums" and "tester/sums" in section(text, "Data")


def test_numbers_measured_later_replace_those_of_the_card_and_nothing_else(build, tmp_path):
    trainer = build()
    trainer.create_model_card(model_name="tiny")
    before = read_card(tmp_path)[1]
    lines = [{**line, "settings": {"thinking": "on"}} for line in (BASE, TRAINED)]
    for _ in range(2):
        add_results(tmp_path / "out", lines)
    after = read_card(tmp_path)[1]
    assert "+0.500 [+0.250, +0.750]" in section(after, "Results") and '"evaluation": "on"' in after
    headings = re.findall("^## .*$", before, re.MULTILINE)
    assert headings == re.findall("^## .*$", after, re.MULTILINE)
    for heading in headings:
        if heading not in ("## Results", "## Method: OPSD"):
            assert section(before, heading[3:]) == section(after, heading[3:]), heading
    (tmp_path / "README.md").write_text("# Somebody's card\n")
    with pytest.raises(ValueError, match="no section '## Results'"):
        add_results(tmp_path, lines)


def test_a_result_without_its_base_says_that_the_base_was_not_measured():
    assert "base was not measured" in results_section([TRAINED])
    assert "base was not measured" not in results_section([BASE, TRAINED])
    assert "not measured |" in results_section([{**BASE, "pass_at_k": 1.0}, TRAINED])


def test_a_lora_card_names_the_adapter_and_its_snippet_loads_it(
    build, make_model, tokenizer, tmp_path, monkeypatch, capsys
):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    trainer = build(str(tmp_path / "base"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="out")
    metadata, text = read_card(tmp_path)
    assert metadata["library_name"] == "peft" and metadata["license"] == "mit"
    assert "LoRA: r 4, alpha 8, on ['q_proj']" in text and "Licence of the base: mit" in text
    if find_spec("matplotlib"):
        assert "(run.png)" in text and (tmp_path / "out" / "run.png").stat().st_size > 1_000
    else:
        assert "No curves" in text
    assert str(tmp_path) not in text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", section(text, "How to load"), re.DOTALL).group(1), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("config_class", [OPSDConfig, OGLSSDConfig, PurifiedOPSDConfig])
def test_every_setting_of_a_method_is_in_the_card(make_args, config_class):
    from trl import GRPOConfig

    args = make_args(config_class, per_device_train_batch_size=8, max_completion_length=2048)
    accelerator = SimpleNamespace(num_processes=2)
    text = settings_section(SimpleNamespace(args=args, accelerator=accelerator, model=object()))
    apart = {"prompt_template", "teacher_prompt_template", "reference_prompt_template"}
    for name in config_class.__dataclass_fields__.keys() - GRPOConfig.__dataclass_fields__.keys() - apart:
        assert f"| `{name}` | " in text
    assert "hub_token" not in text and "Rollouts per optimizer step: 16 (processes: 2)" in text


def test_the_hardware_names_device_processes_and_engine():
    import torch

    def described(engine, stage):
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            distributed_type=SimpleNamespace(value=engine),
            state=SimpleNamespace(deepspeed_plugin=plugin),
            num_processes=2,
            mixed_precision="bf16",
        )
        return describe_hardware(accelerator)

    assert described("DEEPSPEED", 3).startswith("2 x cpu (") and "DEEPSPEED ZeRO-3, mixed precision bf16" in described(
        "DEEPSPEED", 3
    )
    assert "no distributed engine" in described("NO", None)
