# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source distribution hold what a user needs, and nothing of the tests."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
        "commands/dry_run/run.py",
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


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(tmp_path):
    """There the clone's own folder, which bears the package's name, would win as a namespace over a finder."""
    clone, site = tmp_path / "trl_opsd", tmp_path / "site"
    shutil.copytree(ROOT / "trl_opsd", clone / "trl_opsd", ignore=shutil.ignore_patterns("__pycache__", "model"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    run_python(clone, "-c", f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})")
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)  # what pip does with it
    # Without the packages of this environment, where trl_opsd is installed already.
    code = (
        f"import site; site.addsitedir({str(site)!r}); from trl_opsd import __version__, errors; print(errors.__file__)"
    )
    assert run_python(tmp_path, "-S", "-c", code).strip() == str(clone / "trl_opsd" / "errors.py")


def run_python(folder, *words):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
