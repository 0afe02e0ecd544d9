# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub, against a stand-in of its HTTP interface: what arrives, what fails, and what must never leave."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import RESET, Fault, HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd import OPSDConfig
from trl_opsd.demo import model_path

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
WORKER = Path(__file__).parents[1] / "support" / "hub_worker.py"


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        server.files["tester/base"] = {path.name: path.read_bytes() for path in Path(model_path()).iterdir()}
        yield server


def start(hub, tmp_path, command):
    """Run a command that believes in this Hub; returns what it printed."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # its own protocol to another server
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TEST_TOKEN": TOKEN,
        "TEST_RESULT": str(tmp_path / "result.json"),
        "CI": "true",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def run(hub, tmp_path, scenario):
    return start(hub, tmp_path, [sys.executable, str(WORKER), scenario, str(tmp_path / scenario)])


def test_the_stand_in_refuses_a_write_without_the_token(hub):
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(f"{hub.endpoint}/api/repos/create", b"{}"))


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_a_whole_card_and_no_token(hub, tmp_path):
    printed = run(hub, tmp_path, "whole")
    files = hub.files["tester/whole"]
    messages = [message for _, message, _ in hub.commits]
    assert any("step 1" in message for message in messages) and messages[-1] == "End of training"
    assert {"checkpoint-1/model.safetensors", "checkpoint-2/trainer_state.json"} <= files.keys()
    assert {"model.safetensors", "tokenizer.json", "README.md", "run.png", "training_args.bin"} <= files.keys()
    assert files["run.png"].startswith(b"\x89PNG")

    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "apache-2.0" and metadata["base_model"] == "tester/base"
    assert metadata["datasets"] == "tester/sums" and "licence" not in metadata
    for heading in ("How to load", "Results", "Method: OPSD", "Settings", "Training", "Data", "Licence", "Limits"):
        assert f"\n## {heading}\n" in card
    results = card[card.index("## Results") : card.index("## Method")]
    assert "0.125" in results and "0.625" in results and "+0.500 [+0.250, +0.750]" in results
    assert '{"student": false, "teacher": true, "evaluation": "off"}' in card and '"temperature": 1.0' in results
    assert "![" in card and "](run.png)" in card and "None" not in card[card.index("# ") : card.index("## Settings")]
    assert "Licence of the base: apache-2.0" in card and "1 x cpu" in card and f"torch {torch.__version__}" in card

    assert_token_is_nowhere(hub, tmp_path, printed)
    load = re.search(r"## How to load.*?```python\n(.*?)```", card, re.DOTALL).group(1)
    assert start(hub, tmp_path, [sys.executable, "-c", load]).strip()


def assert_token_is_nowhere(hub, tmp_path, printed):
    assert "hf_abc" not in printed
    needle = b"hf_abc"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or needle not in path.read_bytes(), path
    assert len(hub.requests) > 10
    for method, path, body in hub.requests:
        assert needle not in body, (method, path)
    for name, files in hub.files.items():
        for path, content in files.items():
            assert needle not in content, (name, path)


@pytest.mark.slow
def test_an_upload_that_fails_half_way_is_tried_again(hub, tmp_path):
    hub.faults += [Fault("PUT", "/lfs/", 500), Fault("PUT", "/lfs/", RESET), Fault("POST", "/commit/", RESET)]
    run(hub, tmp_path, "retried")
    assert len(hub.failed) == 3
    assert hub.files["tester/retried"].keys() >= {"model.safetensors", "README.md"}
    assert hub.files["tester/retried"]["model.safetensors"] == (tmp_path / "retried/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_refused_upload_says_so_and_leaves_the_saved_model_whole(hub, tmp_path):
    hub.faults += [Fault("POST", "/commit/", 500, times=2), Fault("POST", "/commit/", 403, times=1_000)]
    printed = run(hub, tmp_path, "refused")
    told = json.loads((tmp_path / "result.json").read_text())
    assert len(told["warnings"]) == 4 and "500" in told["warnings"][0] and "403" in told["warnings"][-1]
    assert "tester/refused" in told["error"] and "403" in told["error"] and "hf upload tester/refused" in told["error"]
    assert len(hub.failed) == 5  # two steps of model and checkpoint, and one final upload: a refusal is not repeated
    assert hub.files["tester/refused"] == {}
    assert_token_is_nowhere(hub, tmp_path, printed)
    for folder in ("refused", "refused/checkpoint-2"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        AutoTokenizer.from_pretrained(tmp_path / folder)


def test_no_token_is_in_a_config_that_is_printed_or_pickled(tmp_path):
    config = OPSDConfig(
        str(tmp_path), bf16=False, use_cpu=True, hub_token=TOKEN, model_init_kwargs={"token": TOKEN, "dtype": "auto"}
    )
    torch.save(config, tmp_path / "training_args.bin")
    assert TOKEN.encode() not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None and loaded.model_init_kwargs == {"dtype": "auto"}
    assert loaded.clip == config.clip and config.hub_token == TOKEN
    assert TOKEN not in config.to_json_string()
    config.model_init_kwargs = None
    assert TOKEN not in str(config) + repr(config)
