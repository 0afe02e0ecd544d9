# SPDX-License-Identifier: Apache-2.0
"""The site that `make docs` builds: every page of the docs, every module, and no link that leads nowhere."""

import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import trl_opsd
from trl_opsd import OGLSSDConfig

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pdoc") is None, reason="pdoc is not installed: pip install -e '.[docs]'"),
]


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
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", str(ROOT / "docs" / "build_site.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def broken_links(folder):
    """`page: link` of every link within the site whose file or anchor is not there."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
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
    public = [path for path in modules if not any(part.startswith("_") for part in path.parts)]
    assert len(public) > 30
    for path in public:
        assert (site / "api" / path).with_suffix(".html").exists(), path
    start = (site / "index.html").read_text()
    assert 'href="api/trl_opsd.html"' in start and 'href="docs/methods.html' in start


def test_every_public_name_is_documented_on_the_first_page_of_the_reference(site):
    page = Page(site / "api" / "trl_opsd.html")
    assert set(trl_opsd.__all__) <= page.anchors
    assert "OPSDConfig.teacher_prompt_template" in page.anchors
    help_text = OGLSSDConfig.__dataclass_fields__["steering_strength"].metadata["help"]
    assert help_text in (site / "api" / "trl_opsd" / "trainers" / "ogls_sd.html").read_text()


def test_no_link_of_the_site_leads_nowhere(site):
    assert broken_links(site) == []


def test_the_check_sees_a_broken_link_and_a_broken_anchor(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">x</a><a href="c.html#here">y</a><a href="c.html#gone">z</a>')
    (tmp_path / "c.html").write_text('<h1 id="here">c</h1>')
    assert broken_links(tmp_path) == ["a.html: b.html", "a.html: c.html#gone"]
