# SPDX-License-Identifier: Apache-2.0
"""A static site: README and docs as pages, and the reference of the API from docstrings (pdoc).

    python docs/build_site.py outputs/site

The site has the repository's layout, so relative links stay what they are but for the ending: `README.md` is `index.html`,
`docs/x.md` is `docs/x.html`, the reference is in `api/`, and other files that a page links to are copied.
"""

import inspect
import pkgutil
import re
import shutil
import sys
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

import trl_opsd

ROOT = Path(__file__).parent.parent
IN_THE_BAR = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
PAGES = IN_THE_BAR + sorted(
    str(path.relative_to(ROOT))
    for pattern in ("docs/methods/*.md", "benchmarks/**/README.md", "recipes/**/README.md")
    for path in ROOT.glob(pattern)
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; }}
nav a {{ margin-right: 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; }}
code {{ font-family: ui-monospace, monospace; font-size: .9em; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<nav>{links}</nav>
<main>
{body}
</main>
</body>
</html>
"""


def site_path(page: str) -> str:
    """Where a page of the repository stands in the site."""
    return _renamed(page.removesuffix(".md"))


def write_page(page: str, site: Path) -> None:
    """Render one Markdown file and copy what it links to."""
    source = ROOT / page
    text = source.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        linked = (source.parent / target).resolve()
        if linked.is_file() and linked.suffix != ".md":
            copy = site / linked.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(linked, copy)
    body = re.sub(r'href="(?!https?:)([^"#]*)\.md', lambda m: f'href="{_renamed(m[1])}', to_html(text))
    output = site / site_path(page)
    output.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * page.count("/")
    links = "".join(f'<a href="{up}{site_path(other)}">{Path(other).stem}</a>' for other in IN_THE_BAR)
    links += f'<a href="{up}api/trl_opsd.html">API</a>'
    title = next(iter(re.findall(r"^# (.*)$", text, flags=re.MULTILINE)), page)
    output.write_text(_PAGE.format(title=title, links=links, body=body), encoding="utf-8")


def _renamed(name: str) -> str:
    return f"{name.removesuffix('README')}index.html" if name.endswith("README") else f"{name}.html"


def document_fields(config: type) -> None:
    """Put the help texts of this package's fields of a config into its docstring."""
    ours = [owner for owner in config.__mro__ if owner.__module__.startswith("trl_opsd.")]
    names = {name for owner in ours for name in vars(owner).get("__annotations__", ())}
    declared = (field for field in fields(config) if field.name in names)
    lines = [f"* `{field.name}`: {field.metadata['help']}" for field in declared if "help" in field.metadata]
    config.__doc__ = "\n".join([inspect.getdoc(config) or "", "", "**Fields**", "", *lines])


def drop_dead_anchors(page: Path) -> None:
    """Turn pdoc's links to members that it lists but does not show, TRL's own, into text."""
    text = page.read_text(encoding="utf-8")
    anchors = set(re.findall('id="([^"]+)"', text))
    text = re.sub('<a href="#([^"]+)">(.*?)</a>', lambda m: m[0] if m[1] in anchors else m[2], text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def build(site: Path) -> None:
    """Write the whole site into a folder."""
    pdoc.render.configure(docformat="google")
    for name in trl_opsd.__all__:  # they load when asked for; pdoc looks for what is there
        setattr(trl_opsd, name, getattr(trl_opsd, name))
        if is_dataclass(getattr(trl_opsd, name)) and name.endswith("Config"):
            document_fields(getattr(trl_opsd, name))
    found = pkgutil.walk_packages(trl_opsd.__path__, "trl_opsd.")
    modules = [module.name for module in found if "._" not in module.name]
    with warnings.catch_warnings():
        # A package names its modules again unless it has `__all__`; where it has, pdoc would leave them out.
        warnings.filterwarnings("ignore", "The module specification", UserWarning)
        pdoc.pdoc("trl_opsd", *modules, output_directory=site / "api")
    for page in (site / "api").rglob("*.html"):
        drop_dead_anchors(page)
    for page in PAGES:
        write_page(page, site)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
