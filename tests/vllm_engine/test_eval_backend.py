# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd eval --backend vllm` on a real engine, in a process of its own: greedily it writes what transformers writes."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; `make test-vllm` makes an environment that has it")

from trl_opsd.demo import build_rows, model_path

PLAIN = {"enforce_eager": True, "max_model_len": 256}


def measure(folder, backend, questions, *more):
    words = ["--models", model_path(), "--datasets", str(questions), "--backend", backend, "--dtype", "float32"]
    words += ["--thinking", "off", "--output_dir", str(folder), "--save_completions", "--max_new_tokens", "24", *more]
    words += ["--vllm_options", json.dumps(PLAIN)] if backend == "vllm" else []
    subprocess.run([sys.executable, "-m", "trl_opsd.commands.cli", "eval", *words], check=True, timeout=900)
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("seed-*.json"))]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in build_rows("test", 8)))
    return path


def test_greedy_completions_are_those_of_transformers(tmp_path, questions):
    greedy = ("--num_samples", "1", "--temperature", "0")
    (ours,) = measure(tmp_path / "vllm", "vllm", questions, *greedy)
    (theirs,) = measure(tmp_path / "transformers", "transformers", questions, *greedy)
    assert ours["completions"] == theirs["completions"]
    assert 0 < ours["cut_share"] < 1  # some reach the limit, some end


def test_samples_differ_within_a_question_and_between_seeds(tmp_path, questions):
    zero, one = measure(tmp_path, "vllm", questions, "--num_samples", "4", "--temperature", "1", "--seeds", "0", "1")
    assert zero["completions"] != one["completions"]
    assert any(len({text for text, *_ in group}) > 1 for group in zero["completions"])
