# SPDX-License-Identifier: Apache-2.0
"""benchmarks/train_step.py at toy size: the same loss as TRL's SDFTTrainer where the mathematics is the same."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIELDS = {
    "what",
    "model",
    "rollouts",
    "device",
    "dtype",
    "threads",
    "shape",
    "repeats",
    "steps",
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_extra_mb",
    "loss_peak_mb",
    "loss",
}
TOY = "--model demo --batch 2 --accumulation 2 --prompt 8 --solution 12 --completion 8 --steps 2 --warmup 1 --repeats 1"


@pytest.mark.slow
def test_ours_and_sdft_have_the_same_loss_on_given_rollouts(tmp_path):
    pytest.importorskip("trl", minversion="1.16")
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "benchmarks/train_step.py", *TOY.split(), "--device", "cpu", "--output", str(file)]
    done = subprocess.run(
        [*command, "--contenders", "ours", "sdft-full"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    ours, sdft = map(json.loads, file.read_text().splitlines())
    assert ours["what"] == "ours" and sdft["what"] == "sdft-full"
    for row in (ours, sdft):
        assert row.keys() == FIELDS
        assert row["shape"] == {
            "batch": 2,
            "accumulation": 2,
            "prompt": 8,
            "solution": 12,
            "completion": 8,
            "generations": 1,
        }
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["tokens_per_second"] > 0 and row["peak_extra_mb"] > 0
    assert ours["loss"] == pytest.approx(sdft["loss"], rel=1e-4) and ours["loss"] > 1e-3
    assert json.dumps(ours) in done.stdout and "Relative difference of the losses" in done.stdout


def test_the_papers_trainer_is_refused_without_its_environment():
    command = [sys.executable, "benchmarks/train_step.py", "--contenders", "ours", "paper"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "paper needs --paper_python and --paper_repo" in done.stderr


@pytest.mark.parametrize("name", ["steps", "paper_trainer", "measuring"])
def test_what_the_papers_environment_runs_imports_nothing_of_ours(name):
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [alias.name for node in nodes for alias in node.names] + [getattr(node, "module", "") for node in nodes]
    assert not [module for module in modules if module.startswith("trl_opsd")]
