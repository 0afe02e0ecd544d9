# SPDX-License-Identifier: Apache-2.0
"""What mkdocs.yml cannot say: which files of the repository are pages, and pages for methods and modules.

The site has the repository's layout, so a link is the same on a code host and in the site. MkDocs checks every one.
"""

import ast
import re
from itertools import groupby
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "recipes/**/README.md",
    "benchmarks/**/README.md",
)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def pages() -> list[Path]:
    """Every page that the repository holds."""
    return sorted(path for pattern in _PAGES for path in ROOT.glob(pattern))


def linked_files() -> set[Path]:
    """What pages link to beside each other: pictures, recipes, examples."""
    found = (
        (page.parent / target).resolve()
        for page in pages()
        for target in _LINK.findall(page.read_text(encoding="utf-8"))
    )
    return {path for path in found if path.is_file() and path.suffix != ".md"}


def modules() -> list[str]:
    """Names of the modules that are not private, the package first."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "trl_opsd").rglob("*.py")))
    names = (".".join(path.parts).removesuffix(".__init__") for path in paths)
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def on_config(config):
    """Put the pages of methods and of modules into the navigation."""
    sections = {name: entries for entry in config.nav if isinstance(entry, dict) for name, entries in entry.items()}
    sections["Methods"] += [str(path.relative_to(ROOT)) for path in pages() if path.parent.name == "methods"]
    for room, entries in groupby(modules(), key=lambda name: name.split(".")[1:2]):
        listed = [{name.removeprefix("trl_opsd."): f"api/{name}.md"} for name in entries]
        sections["Reference"] += [{room[0]: listed}] if room else listed
    return config


def on_files(files, config):
    """Lay out the repository's pages, what they link to, and a page for each module; keep the theme's own files."""
    kept = [
        file for file in files if not file.abs_src_path or Path(config.docs_dir) not in Path(file.abs_src_path).parents
    ]
    read = [*pages(), *sorted(linked_files())]
    kept += [File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in read]
    kept += [File.generated(config, f"api/{name}.md", content=_module_page(name)) for name in modules()]
    return Files(kept)


def public_names() -> dict[str, str]:
    """Public name -> where it is documented, from the imports that the package shows to editors."""
    tree = ast.parse((ROOT / "trl_opsd" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name: f"trl_opsd.{node.module}.{alias.name}" for node in imports for alias in node.names}


def _module_page(name: str) -> str:
    page = f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    if name != "trl_opsd":
        return page
    links = "".join(f"- [`{public}`][{home}]\n" for public, home in sorted(public_names().items()))
    hidden = "".join(f"\n::: {home}\n" for home in public_names().values() if "._" in home)  # its module has no page
    return f"{page}\n## Public names\n\n{links}{hidden}"


class HelpTexts(griffe.Extension):
    """Settings are documented by their help texts: `name: type = option(default, "help")`."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """Make the help text the docstring and the default the value that is shown."""
        call = _call_of_option(attr)
        if call is None or attr.docstring is not None:
            return
        default, help_text = call.args
        if isinstance(help_text, ast.Constant):
            attr.docstring = griffe.Docstring(help_text.value, parent=attr)
        attr.value = ast.unparse(default)


def _call_of_option(attr: griffe.Attribute) -> ast.Call | None:
    if not str(attr.value).startswith("option("):
        return None
    return ast.parse(str(attr.value), mode="eval").body
