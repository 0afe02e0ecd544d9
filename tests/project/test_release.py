# SPDX-License-Identifier: Apache-2.0
"""Files beside the package say what the package and the Makefile say."""

import re
from pathlib import Path

import yaml

import trl_opsd

ROOT = Path(__file__).parents[2]


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    targets = workflow["jobs"]["lane"]["strategy"]["matrix"]["target"]
    assert targets == re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)


def test_every_workflow_and_form_is_yaml():
    for path in [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert yaml.safe_load(path.read_text()), path


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == trl_opsd.__version__
    (ruff,) = re.findall(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    hooks = {
        each["repo"]: each["rev"] for each in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    }
    assert hooks["https://github.com/astral-sh/ruff-pre-commit"] == f"v{ruff}"


def test_the_image_copies_what_the_build_needs():
    wanted = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE))
    copied = {
        name
        for line in re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
        for name in line.split()
    }
    assert copied == wanted and all((ROOT / name).exists() for name in wanted)
