# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source distribution hold what a user needs, and nothing of the tests."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_its_data(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    wheel = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for name in (
        "py.typed",
        "accelerate_configs/zero3_cpu.yaml",
        "demo/opsd.yaml",
        "dry_run/command.py",
        "demo/model/model.safetensors",
        "demo/model/tokenizer.json",
        "losses/fused.py",
        "inspect/page.html",
    ):
        assert f"trl_opsd/{name}" in wheel
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in wheel)
    metadata = next(name for name in wheel if name.endswith("METADATA"))
    text = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text and "Provides-Extra: deepspeed" in text
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("trl_opsd/demo/model/model.safetensors") for name in archive.getnames())
