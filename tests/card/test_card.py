# SPDX-License-Identifier: Apache-2.0
"""The model card tells what it knows, says what was not measured, and holds nothing of the machine or of a token."""

import ast
import datetime
import re
from importlib.util import find_spec
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_opsd import OGLSSDConfig, OPSDConfig, OPSDTrainer, PurifiedOPSDConfig
from trl_opsd.card import add_results, results_section
from trl_opsd.card.facts import describe_hardware
from trl_opsd.card.markdown import cell, code_span, escaped, hub_link, keyword_arguments, table
from trl_opsd.card.sections import loading, settings_section
from trl_opsd.methods.papers import arxiv_paper

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
    add_results(tmp_path, lines)
    added = (tmp_path / "README.md").read_text()
    assert "---\n# Somebody's card\n\n## Results\n" in added and "+0.500" in added


def metrics_of(folder):
    """Name and value of every metric as the Hub's own library reads them from a card."""
    data = ModelCard.load(folder / "README.md").data
    return data.model_name, {(each.dataset_name, each.metric_name): each.metric_value for each in data.eval_results}


def test_numbers_are_metrics_of_the_metadata_and_survive_a_second_writing(build, tmp_path):
    trainer = build()
    trainer.create_model_card(model_name="tiny")
    assert "model-index" not in read_card(tmp_path)[0]
    lines = [{**line, "pass_at_k": 0.75, "mean_completion_length": 17.0} for line in (BASE, TRAINED)]
    other = [
        {**line, "dataset": "other sums", "avg_at_k": value} for line, value in zip(lines, (0.25, 0.5), strict=True)
    ]
    add_results(tmp_path / "out", [*lines, *other])
    before = read_card(tmp_path)
    wanted = {
        ("sums", "avg@2"): 0.625,
        ("sums", "pass@2"): 0.75,
        ("other sums", "avg@2"): 0.5,
        ("other sums", "pass@2"): 0.75,
    }
    assert metrics_of(tmp_path / "out") == ("tiny", wanted)  # the base's numbers are not this model's
    add_results(tmp_path / "out", [*lines, *other])
    assert read_card(tmp_path) == before
    add_results(tmp_path / "out", [BASE, {**TRAINED, "avg_at_k": 0.375}])
    assert metrics_of(tmp_path / "out") == ("tiny", {("sums", "avg@2"): 0.375})
    (first, *_) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert first.task_type == "text-generation" and first.metric_type == "accuracy"
    assert first.metric_args["difference_to_base"] == {"estimate": 0.5, "low": 0.25, "high": 0.75}
    before, after = before[0], read_card(tmp_path)[0]
    assert before.keys() == after.keys() and after["pipeline_tag"] == "text-generation"
    trainer.create_model_card(model_name="tiny", evaluation=[BASE, TRAINED])
    assert metrics_of(tmp_path / "out") == ("tiny", {("sums", "avg@2"): 0.625})


def test_a_card_without_metadata_gets_metrics_under_the_name_of_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("# Somebody's card\n")
    add_results(tmp_path / "run", [TRAINED])
    assert metrics_of(tmp_path / "run") == ("run", {("sums", "avg@2"): 0.625})


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
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "moved")  # it names no place of this machine
    monkeypatch.chdir(tmp_path / "elsewhere" / "moved")
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


# Hostile names and settings

HOSTILE = (
    "</td><script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "](https://evil.example) ![x](https://evil.example/x.png)",
    "a | b\n# Heading\n---\nlicense: mit",
    "`` ` ```\n~~~ **bold** _x_ \\ &lt; <!-- -->",
    "https_//evil.example/#\"'{{ 7 * 7 }}",
    "## Training procedure",
)


def rendered(markdown):
    """HTML of it, as a page on the Hub would be made before it is cleaned."""
    markdown_it = pytest.importorskip("markdown_it", reason="comes with rich")
    return markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown)


def shown(markdown):
    """The text that a reader sees of a paragraph, and the tags in it."""
    import html

    page = rendered(markdown)
    return html.unescape(re.sub(r"<[^>]*>", "", page)), set(re.findall(r"<(\w+)", page))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_as_it_is_and_does_nothing(name):
    line = " ".join(name.split())
    assert shown(escaped(name)) == (f"{line}\n", {"p"})
    assert shown(f"# {escaped(name)}") == (f"{line}\n", {"h1"})
    assert shown(f"x {hub_link(name)}") == (f"x {line}\n", {"p", "a"})
    assert re.findall('href="([^"]*)"', rendered(hub_link(name)))[0].startswith("https://huggingface.co/")
    text, tags = shown(f"x {code_span(name)}")
    assert " ".join(text.split()) == f"x {line}" and tags == {"p", "code"}
    rows = table([["a", "b"], ["---", "---"], [cell(name), "1"]])
    assert rendered(rows).count("<td>") == 2 and shown(rows)[1] == {"table", "thead", "tr", "th", "tbody", "td"}


def test_plain_names_stay_readable_in_the_source():
    for name in ("Qwen/Qwen3-1.7B", "meta-llama/Llama_3.2_1B", "aime24", "outputs/run_1"):
        assert escaped(name) == name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_with_hostile_names_keeps_its_sections_its_metadata_and_its_links(build, tmp_path, name):
    trainer = build(teacher_prefix=name, chat_template_kwargs={"enable_thinking": False, "note": name})
    lines = [{**line, "dataset": name, "settings": {"prompt_template": name}} for line in (BASE, TRAINED)]
    trainer.create_model_card(model_name=name, dataset_name=name, evaluation=lines)
    card = ModelCard((tmp_path / "out" / "README.md").read_text())  # as the Hub reads it
    metadata = card.data.to_dict()
    assert card.data.model_name == name and metadata["datasets"] == name and "license" not in metadata
    page = rendered(card.text)
    addresses = [urlsplit(address) for address in re.findall('(?:href|src)="([^"]*)"', page)]
    assert {address.netloc for address in addresses} <= {"arxiv.org", "pypi.org", "huggingface.co", "github.com", ""}
    assert {address.scheme for address in addresses} <= {"https", ""} and "<script" not in page
    headings = ["How to load", "Results", "Method: OPSD", "Settings", "Training", "Data", "Licence", "Limits"]
    assert re.findall("<h2>(.*?)</h2>", page)[:8] == headings
    assert page.count("<h1>") == 1 and page.count("It has been trained using") == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_thinking": False, "tools": None},
        {"enable-thinking": False},
        {"x=1); import os; os.system('true'); dict(y": 1, "enable_thinking": True},
        {"class": 1, "__import__('os')": [1, {"a": float("0.5")}]},
        {'"quoted"\n': "```\nimport os"},
        {"date_string": datetime.date(2024, 7, 26)},
    ],
)
def test_the_snippet_passes_any_chat_template_arguments_and_runs_nothing_else(make_args, kwargs):
    text = loading(make_args(chat_template_kwargs=kwargs), None, False)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = sorted(getattr(call.func, "attr", getattr(call.func, "id", None)) for call in calls)
    assert names == ["apply_chat_template", "decode", "from_pretrained", "from_pretrained", "generate", "print"]
    source = keyword_arguments(kwargs)
    passed = eval(f"dict(x=0{source})")
    dated = {key: str(value) if isinstance(value, datetime.date) else value for key, value in kwargs.items()}
    assert passed == {"x": 0, **dated}


def test_a_snippet_loads_by_the_id_of_the_hub_and_else_from_its_own_folder(make_args):
    args = make_args(prompt_template="\U0001f600 {prompt}")
    assert "name = 'tester/model'\n" in loading(args, "tester/model", False)
    local = loading(args, None, True)
    assert "name = '.'\n" in local and "Start Python in the folder of this card" in local
    assert "\U0001f600 2+3=?" in local and "\\ud83d" not in local


def test_a_paper_is_cited_as_bibtex_with_the_year_of_its_number():
    cited = arxiv_paper("A Title", "2605.11609", "shen2026", "Guobin Shen and Xing Yu")["citation"]
    assert cited == (
        "@misc{shen2026,\n    title  = {{A Title}},\n    author = {Guobin Shen and Xing Yu},\n    year   = 2026,\n"
        "    eprint = {2605.11609},\n    archivePrefix = {arXiv},\n}"
    )
    assert "author" not in arxiv_paper("A Title", "2501.00001", "key")["citation"]
