# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs say is true: snippets run, links lead somewhere, tables match the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_opsd.config import OPSDConfig
from trl_opsd.diagnostics import BUCKETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "recipes").rglob("README.md"))


def snippets(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


@pytest.mark.slow
@pytest.mark.parametrize("code", snippets(ROOT / "README.md", "python"))
def test_python_snippets_of_the_readme_run(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_commands_of_the_readme_exist():
    text = "\n".join(snippets(ROOT / "README.md", "bash"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"make ([\w-]+)", text):
        assert target in targets
    for script in re.findall(r"(examples/\S+\.py)", text):
        assert (ROOT / script).exists()
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert f"\n{extra} = " in extras.group(1)


def test_settings_named_in_the_docs_exist():
    fields = set(OPSDConfig.__dataclass_fields__)
    for page in PAGES:
        for name in re.findall(r"`(\w+)=[^`]*`", page.read_text()):
            assert name in fields or name in {"trl"}, (page.name, name)


def test_the_table_of_diagnostics_names_what_is_logged():
    text = (ROOT / "docs" / "methods.md").read_text()
    for name in ("divergence", "clipped_share", "student_entropy", "target_entropy", "entropy_gap"):
        assert f"`{name}`" in text
    assert "`divergence/first_token`" in text and "first_token" in BUCKETS


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"DEMO_TABLE|DEMO_TIME|TEST_LINE|SUPPORTED_TRL|TODO|FIXME", page.read_text()), page.name
