# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs say is true: snippets run, links lead somewhere, tables match the code."""

import inspect
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from groups import reward_boxed

from trl_opsd import Method, OGLSSDTrainer, OPSDConfig, OPSDGKDConfig, SelfDistillationTrainer, TeacherContext
from trl_opsd.experimental.brts.trainer import BRTSTrainer
from trl_opsd.experimental.stableopd.trainer import StableOPDTrainer
from trl_opsd.losses import fused_divergence
from trl_opsd.methods import OGLS_SD
from trl_opsd.pages import PAGES as PAGES_OF_METHODS
from trl_opsd.pages import settings_of
from trl_opsd.rewards import skip_errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{index}")
    for page in PAGES
    if page.stem != "example-card"  # whose snippet loads the model beside it
    for index, code in enumerate(snippets(page, "python"))
]


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS)
def test_python_snippets_of_the_readme_and_the_docs_run(code, tmp_path):
    if "trainer.train()" in code:
        code += "\nassert trainer.state.global_step == trainer.args.max_steps == 2\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", PAGES_OF_METHODS)
def test_each_method_has_a_page_and_a_row_of_the_choosing_table(name):
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.exists()
    table = (ROOT / "docs" / "methods.md").read_text().split("## Choosing a method")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip().lower() for line in table.splitlines() if line.startswith("| ")]
    assert [row for row in rows if f"(methods/{name}.md)" in row or row.startswith(name.replace("-", " "))], name


def test_every_page_of_a_method_is_linked_from_the_choosing_table():
    table = (ROOT / "docs" / "methods.md").read_text().split("## Choosing a method")[1].split("\n## ")[0]
    pages = {f"methods/{page.name}" for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == set(re.findall(r"\((methods/[\w-]+\.md)\)", table))


def test_every_page_is_in_the_navigation_of_the_site():
    """The strict build, which another environment runs, would end at one that is not; those of methods are added by it."""
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"^ *- (\S+\.md)$", text, flags=re.MULTILINE))
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.parent.name != "methods"}
    assert pages <= named, "name the page under `nav` of mkdocs.yml"
    assert all((ROOT / name).exists() for name in named)


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


def test_the_table_of_commands_has_every_method():
    page = (ROOT / "docs" / "command-line.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| `opsd`,")]
    assert re.findall(r"`([\w-]+)`", row.split(" | ")[0]) == list(PAGES_OF_METHODS)


def test_settings_named_in_the_docs_exist():
    owners = (OPSDConfig, OPSDGKDConfig, Method, TeacherContext, *map(settings_of, PAGES_OF_METHODS))
    fields = {name for owner in owners for name in owner.__dataclass_fields__}
    fields |= set(inspect.signature(fused_divergence).parameters)
    for page in PAGES:
        for name in re.findall(r"`(\w+)=[^`]*`", page.read_text()):
            assert name in fields or name in {"trl"}, (page.name, name)


def migration_rows():
    """(section, their names, our names) of every row of the tables that compare arguments."""
    section = None
    for line in (ROOT / "docs" / "migration.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `"):
            theirs, ours = line.split("|")[1:3]
            yield section, re.findall(r"`(\w+)", theirs), re.findall(r"`(\w+)", ours)


def test_the_tables_of_migration_name_what_exists_on_both_sides():
    import inspect

    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.gkd import GKDConfig
    from trl.experimental.sdft import SDFTConfig
    from trl.experimental.sdpo import SDPOConfig

    import trl_opsd

    ours_of = {"SDFT": trl_opsd.SDFTConfig, "SDPO": trl_opsd.SDPOConfig, "GKD": OPSDGKDConfig}
    configs = {"SDFT": SDFTConfig, "SDPO": SDPOConfig, "GRPO": GRPOConfig, "GKD": GKDConfig}
    arguments = set(inspect.signature(GRPOTrainer.__init__).parameters)
    sections = set()
    for section, theirs, ours in migration_rows():
        sections.add(section)
        named = ours_of.get(section.split("'s ")[-1], trl_opsd.OGLSSDConfig)
        assert set(ours) <= set(named.__dataclass_fields__) | arguments, (section, ours)
        config = configs.get(section.split("'s ")[-1])
        if config is not None:
            assert set(theirs) <= set(config.__dataclass_fields__) | arguments, (section, theirs)
    assert len(sections) == 5


@pytest.mark.parametrize("name", ["SDFT", "SDPO", "GKD"])
def test_every_setting_of_a_trl_relative_is_in_its_table_of_migration(name):
    """What its config adds, generation and vLLM apart, which are GRPO's here too."""
    import importlib

    from trl import GRPOConfig, SFTConfig

    config = getattr(importlib.import_module(f"trl.experimental.{name.lower()}"), f"{name}Config")
    listed = {item for section, theirs, _ in migration_rows() if section.endswith(name) for item in theirs}
    known = set(GRPOConfig.__dataclass_fields__) | set(SFTConfig.__dataclass_fields__)
    missing = set(config.__dataclass_fields__) - known - listed
    assert not missing


# Of the table, but TRL's own, or logged by the reward function.
LOGGED_ELSEWHERE = {"completions/mean_length", "completions/clipped_ratio", "rewards/unscored"}


def diagnostics_rows():
    """The names of each row of the table of diagnostics; a name of several parts may end with `...`."""
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text.split("## Diagnostics in the log")[1].split("\n\n")[1]
    for line in table.splitlines()[2:]:
        cell = line.split("|")[1]
        names = re.findall(r"`([^`]+)`", cell)
        yield [*names, *(f"{names[0].partition('/')[0]}/..." for _ in range(cell.count(", ...")))]


def matches(row_name, logged):
    pattern = re.escape(row_name).replace(r"\.\.\.", ".*").replace("NAME", "[a-z_]+")
    return re.fullmatch(pattern, logged) is not None


def test_the_table_of_diagnostics_and_the_log_have_the_same_names(build_group, monkeypatch):
    """Of a run in which everything that is logged by us is due, its names go through one function."""
    asks = replace(
        OGLS_SD,
        asks=lambda rollout, settings: TeacherContext("teacher", rollout.solution),
        decomposition_steps=lambda settings: 1,
    )
    logged, add = set(), SelfDistillationTrainer.add_metrics

    def recorded(self, metrics):
        logged.update(metrics)
        add(self, metrics)

    monkeypatch.setattr(SelfDistillationTrainer, "add_metrics", recorded)
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 1}
    settings |= {"distillation_length": "2..6 in 4", "teacher_model_kind": "ema"}
    monkeypatch.setattr(OGLSSDTrainer, "method", asks)
    build_group(reward=skip_errors(reward_boxed), **settings).train()
    held = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    build_group(StableOPDTrainer, **held, max_completion_length=24).train()
    build_group(BRTSTrainer, **held, max_completion_length=24).train()
    rows = list(diagnostics_rows())
    undocumented = {name for name in logged if not any(matches(own, name) for row in rows for own in row)}
    assert not undocumented
    never_logged = [
        row
        for row in rows
        if not LOGGED_ELSEWHERE & {*row} and not any(matches(own, name) for own in row for name in logged)
    ]
    assert not never_logged
