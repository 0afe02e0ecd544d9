# SPDX-License-Identifier: Apache-2.0
"""The site that `make docs` builds: every page of the docs, every module, and no link that leads nowhere."""

import json
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import trl_opsd
from trl_opsd import OGLSSDConfig

ROOT = Path(__file__).parents[2]
MKDOCS = Path(os.environ.get("MKDOCS", ROOT / ".venv-docs" / "bin" / "mkdocs"))


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a page outside the navigation or a link that leads nowhere ends the build."""
    if not MKDOCS.exists():
        pytest.skip(f"{MKDOCS} is not there: `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [str(MKDOCS), "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def broken_links(folder):
    """`page: link` of every link within the site whose file or anchor is not there."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}  # from the root
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return sorted(broken)


def test_every_page_and_every_module_is_there(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT)).with_suffix(".html").stat().st_size > 500
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "trl_opsd").rglob("*.py")]
    public = [path.parts for path in modules if not any(part.startswith("_") for part in path.parts)]
    assert len(public) > 150
    for parts in public:
        assert (site / "api" / f"{'.'.join(parts)}.html").exists(), parts
    start = Page(site / "index.html")
    assert {"api/trl_opsd.html", "docs/methods.html"} <= start.links


def test_every_public_name_is_on_the_first_page_of_the_reference_and_settings_have_their_help(site):
    links = {unquote(urlsplit(link).fragment).split(".")[-1] for link in Page(site / "api" / "trl_opsd.html").links}
    assert set(trl_opsd.__all__) <= links
    config = site / "api" / "trl_opsd.trainers.ogls_sd.html"
    assert "trl_opsd.trainers.ogls_sd.OGLSSDConfig.steering_strength" in Page(config).anchors
    text = " ".join(config.read_text().split())
    help_text = OGLSSDConfig.__dataclass_fields__["steering_strength"].metadata["help"]
    assert help_text in text and "option(" not in text


def test_the_search_finds_pages_and_settings(site):
    index = (site / "search" / "search_index.json").read_text()
    assert '"location":"docs/methods/rlrt.html"' in index and "teacher_prompt_template" in index


def test_no_link_of_the_site_leads_nowhere(site):
    assert broken_links(site) == []


def test_the_check_sees_a_broken_link_and_a_broken_anchor(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">x</a><a href="c.html#here">y</a><a href="c.html#gone">z</a>')
    (tmp_path / "c.html").write_text('<h1 id="here">c</h1>')
    assert broken_links(tmp_path) == ["a.html: b.html", "a.html: c.html#gone"]


def test_a_release_becomes_a_version_of_the_site(tmp_path):
    mike = MKDOCS.with_name("mike")
    if not mike.exists():
        pytest.skip(f"{mike} is not there: `make docs` installs it")
    path = f"{mike.parent}{os.pathsep}{os.environ['PATH']}"  # where mike looks for mkdocs
    author = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PATH": path} | author

    def run(*command, cwd=tmp_path / "clone"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run("git", "clone", "-q", str(ROOT), "clone", cwd=tmp_path)
    run(str(mike), "deploy", "--update-aliases", "0.1", "latest")
    assert json.loads(run("git", "show", "gh-pages:versions.json")) == [
        {"version": "0.1", "title": "0.1", "aliases": ["latest"]}
    ]
    assert "Choosing a method" in run("git", "show", "gh-pages:0.1/docs/methods.html")
