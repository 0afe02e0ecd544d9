# SPDX-License-Identifier: Apache-2.0
"""docs/example-card.md is the card that the demo writes; only its numbers are a longer run's and of one machine."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from trl_opsd.demo.run import run_demo

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "example-card.md"


@pytest.fixture
def script():
    spec = spec_from_file_location("example_card", DOCS / "example_card.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def form_of(page):
    """The lines of a page without numbers, machine and packages, tags in order; rows of a table that are equal then stand once."""
    page = re.sub(  # TRL keeps tags in a set, whose order is a process's own
        r"^tags:\n((?:- .*\n)+)",
        lambda found: "tags:\n" + "".join(sorted(found.group(1).splitlines(True))),
        page,
        count=1,
        flags=re.MULTILINE,
    )
    page = re.sub(r"### Framework versions\n.*?(?=## Citations)", "", page, flags=re.DOTALL)
    lines = [line for line in page.splitlines() if not line.startswith(("Hardware: ", "Packages: "))]
    lines = [re.sub(r"(?<![\w/])[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", line) for line in lines]
    return [line for before, line in zip([None, *lines], lines, strict=False) if line != before or line[:1] != "|"]


def card_of(page):
    """Metadata and text of the card on a page."""
    _, metadata, text = page.split("````markdown\n")[1].removesuffix("````\n").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_metadata_has_the_numbers_of_the_cards_own_table():
    metadata, text = card_of(PAGE.read_text(encoding="utf-8"))
    name, results = model_index_to_eval_results(metadata["model-index"])
    (trained,) = re.findall(r"\| trained \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text)
    shown = {result.metric_type: f"{result.metric_value:.3f}" for result in results}
    assert name == "seed-0" and shown == dict(zip(("accuracy", "pass@k", "majority@k"), trained, strict=True))
    assert {"license", "pipeline_tag", "tags", "library_name"} <= metadata.keys()


@pytest.mark.slow
def test_the_example_is_what_the_demo_writes_apart_from_numbers(tmp_path, script):
    quick = ["--max_steps=3", "--per_device_train_batch_size=4", "--max_completion_length=24", "--disable_tqdm=true"]
    run_demo(str(tmp_path), [0], 8, 2, ["--use_cpu=true", *quick])
    written = script.page_of(tmp_path / "seed-0", "trl-opsd demo")
    assert form_of(PAGE.read_text(encoding="utf-8")) == form_of(written)
    assert str(tmp_path) not in written
