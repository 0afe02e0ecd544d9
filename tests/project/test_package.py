# SPDX-License-Identifier: Apache-2.0
"""The package as a newcomer meets it: cheap to import, typed, licensed, documented, with a frozen surface."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trl_opsd

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "trl_opsd").rglob("*.py"))
HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "math_verify", "numpy")


def relative(path):
    return str(path.relative_to(ROOT))


def in_fresh_interpreter(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_importing_the_package_loads_no_heavy_library():
    code = f"import sys, trl_opsd; dir(trl_opsd); print([name for name in {HEAVY} if name in sys.modules])"
    loaded = in_fresh_interpreter(code)
    assert loaded.strip() == "[]"


def test_dir_lists_the_public_names_before_they_are_loaded():
    listed = in_fresh_interpreter("import trl_opsd; print(' '.join(dir(trl_opsd)))").split()
    assert set(trl_opsd.__all__) <= set(listed)


def test_the_public_names_are_a_frozen_set():
    assert set(trl_opsd.__all__) == {
        "AntiSDConfig",
        "AntiSDTrainer",
        "CritiqueSDConfig",
        "CritiqueSDTrainer",
        "DemoPSDConfig",
        "DemoPSDTrainer",
        "EGRSDConfig",
        "EGRSDTrainer",
        "MSDConfig",
        "MSDTrainer",
        "SSOPDConfig",
        "SSOPDTrainer",
        "TRACEConfig",
        "TRACETrainer",
        "PBSDConfig",
        "PBSDTrainer",
        "RCSDConfig",
        "RCSDTrainer",
        "MOPDConfig",
        "MOPDTrainer",
        "RESDConfig",
        "RESDTrainer",
        "SDFTConfig",
        "SDFTTrainer",
        "SDPOConfig",
        "SDPOTrainer",
        "SGSDConfig",
        "SGSDTrainer",
        "SORTConfig",
        "SORTTrainer",
        "VPDConfig",
        "VPDTrainer",
        "VOPDConfig",
        "VOPDTrainer",
        "RethinkingOPDConfig",
        "RethinkingOPDTrainer",
        "POPDConfig",
        "POPDTrainer",
        "RLSDConfig",
        "RLSDTrainer",
        "RLRTConfig",
        "RLRTTrainer",
        "DASDConfig",
        "DASDTrainer",
        "BRTSConfig",
        "BRTSTrainer",
        "StableOPDConfig",
        "StableOPDTrainer",
        "OGLSSDConfig",
        "OGLSSDTrainer",
        "CollapseGuard",
        "EvaluationCallback",
        "Method",
        "OPSDConfig",
        "OPSDGKDConfig",
        "OPSDGKDTrainer",
        "OPSDTrainer",
        "PurifiedOPSDConfig",
        "PurifiedOPSDTrainer",
        "Rollout",
        "SelfDistillationTrainer",
        "TeacherContext",
        "UnsupportedTRLError",
        "accuracy_reward",
    }


@pytest.mark.parametrize("name", trl_opsd.__all__)
def test_each_public_name_loads_and_is_the_one_of_its_module(name):
    home = importlib.import_module(f"trl_opsd.{trl_opsd._HOME_OF[name]}")
    assert getattr(trl_opsd, name) is getattr(home, name)


def test_lazy_names_typed_names_and_public_names_are_the_same():
    tree = ast.parse((ROOT / "trl_opsd" / "__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed_names = {alias.asname for node in typed.body for alias in node.names}
    assert typed_names == set(trl_opsd._HOME_OF) == set(trl_opsd.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trl_opsd' has no attribute 'GRPOTrainer'"):
        trl_opsd.GRPOTrainer  # noqa: B018
    with pytest.raises(ImportError):
        from trl_opsd import GRPOTrainer  # noqa: F401


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_one_of_pyproject():
    assert trl_opsd.__version__ == project()["version"]


def test_the_supported_trl_is_the_range_of_pyproject():
    from trl_opsd._trl.versions import SUPPORTED_TRL

    (wanted,) = [requirement for requirement in project()["dependencies"] if requirement.startswith("trl>")]
    assert wanted == f"trl{SUPPORTED_TRL}"


def test_the_package_is_typed():
    assert (ROOT / "trl_opsd" / "py.typed").exists()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_names_its_licence_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


def public_definitions(tree):
    """Public functions, classes and their public methods, nested functions left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_public_function_and_class_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    bare = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    # A method that implements a documented one of its base class is documented there.
    loaded = importlib.import_module(module) if bare else None
    bare = [name for name in bare if not inherits_documentation(loaded, name)]
    assert not bare


def inherits_documentation(module, name):
    owner, _, method = name.partition(".")
    bases = inspect.getmro(getattr(module, owner))[1:] if method else ()
    return any(inspect.getdoc(getattr(base, method)) for base in bases if hasattr(base, method))
