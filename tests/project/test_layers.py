# SPDX-License-Identifier: Apache-2.0
"""Imports point down: what knows TRL stands above what does not, and one room names TRL's private parts, all of them listed."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from trl import GRPOTrainer

from trl_opsd._trl import checkpoints, naming, prompts, rollouts, versions
from trl_opsd.pages import PAGES

PACKAGE = Path(__file__).parents[2] / "trl_opsd"

# Rooms from the ground up; one that is not named stands on the roof.
FLOORS = (
    {"errors", "losses", "pages", "rows", "user_functions", "verification"},
    {"model", "monitoring", "rewards"},
    {"checkpoints", "teacher"},
    {"methods", "settings"},
    {"_trl", "card"},
    {"evaluation"},
    {"trainers"},
)
ROOF = len(FLOORS)
TRL_FLOOR = 4
LOSSES_NEED = {"torch"}
KERNEL = "losses/sweep_kernel.py"  # is imported where it is asked for alone, and needs Triton
MODULES = sorted(PACKAGE.rglob("*.py"))


def relative(path):
    return str(path.relative_to(PACKAGE))


def part_of(path):
    """The module or sub-package of `trl_opsd` that a file belongs to; "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def floor_of(part):
    return next((floor for floor, parts in enumerate(FLOORS) if part in parts), ROOF)


def imports_of(path):
    """Absolute dotted names of everything a file imports, imports inside functions too."""
    inside = ("trl_opsd", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            if base == "trl_opsd":
                yield from (f"trl_opsd.{alias.name}" for alias in node.names)
            else:
                yield base


def parts_used(path):
    names = [name.split(".") for name in imports_of(path)]
    return {name[1] for name in names if name[0] == "trl_opsd" and len(name) > 1}


def test_every_named_module_exists():
    found = {part_of(path) for path in MODULES}
    assert set().union(*FLOORS) <= found


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path)], ids=relative)
def test_a_module_uses_its_own_floor_and_those_below(path):
    own = floor_of(part_of(path))
    above = {part for part in parts_used(path) if floor_of(part) > own}
    assert not above


@pytest.mark.parametrize("name", PAGES)
def test_a_method_fits_on_a_page(name):
    """At most 90 lines beneath the licence: a formula, a format of rows and what methods share stand elsewhere."""
    own = name.replace("-", "_")
    page = f"experimental/{own}/method.py" if PAGES[name].experimental else f"methods/{own}.py"
    assert len((PACKAGE / page).read_text(encoding="utf-8").splitlines()) - 1 <= 90


def test_no_two_parts_use_each_other():
    graph = {}
    for path in MODULES:
        if part_of(path):
            graph.setdefault(part_of(path), set()).update(parts_used(path) - {part_of(path)})
    done = set()

    def visit(part, above):
        assert part not in above, f"cycle: {' -> '.join([*above, part])}"
        if part not in done:
            for used in graph.get(part, ()):
                visit(used, [*above, part])
            done.add(part)

    for part in graph:
        visit(part, [])


@pytest.mark.parametrize("path", [p for p in MODULES if floor_of(part_of(p)) < TRL_FLOOR], ids=relative)
def test_trl_is_unknown_below_the_config(path):
    assert not [name for name in imports_of(path) if name.split(".")[0] == "trl"]


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "losses"], ids=relative)
def test_the_losses_need_torch_and_nothing_else(path):
    foreign = {name.split(".")[0] for name in imports_of(path)} - LOSSES_NEED - sys.stdlib_module_names
    assert foreign <= {"trl_opsd"} | ({"triton"} if relative(path) == KERNEL else set())
    assert parts_used(path) <= {"losses"}


@cache
def private_names_of_trl():
    """Private methods and instance attributes of GRPOTrainer and of what it inherits."""
    names = {name for name in dir(GRPOTrainer) if re.fullmatch("_[a-z].*", name)}
    for owner in GRPOTrainer.__mro__:
        if owner.__module__.split(".")[0] in ("trl", "transformers"):
            names |= set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(owner)))
    return names | set(versions.METHODS)


def attributes_of_a_trainer(tree):
    """Names read from `self`, `super()`, `trainer` or `something.trainer`."""

    def is_trainer(node):
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and node.func.id == "super"
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
        return name in ("self", "cls", "trainer")

    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_trainer(node.value)}


def names_made_in(tree):
    """What a file defines itself: functions, and attributes of `self` that it assigns."""
    made = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return made | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def test_the_list_of_private_names_is_not_empty():
    names = private_names_of_trl()
    assert {"_buffered_inputs", "_compute_loss", "_signature_columns"} <= names


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) != "_trl"], ids=relative)
def test_one_room_names_trls_private_parts(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = attributes_of_a_trainer(tree) & private_names_of_trl()
    if part_of(path) != "trainers":  # elsewhere `self` is no trainer, so a name made there is its own
        used -= names_made_in(tree)
    assert not used


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "trainers"], ids=relative)
def test_no_trainer_reuses_a_private_name_of_trl_for_its_own(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not names_made_in(tree) & private_names_of_trl()


# What transformers documents of its Trainer, and TRL of its own.
DOCUMENTED = {
    "__init__",
    "accelerator",
    "args",
    "create_optimizer",
    "model",
    "model_wrapped",
    "processing_class",
    "state",
    "train",
}
DOCUMENTED |= {"train_dataset"}


def names_asked_for(tree):
    """Names in `getattr(self, "name")` and `hasattr(self, "name")`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    asked = [
        call.args for call in calls if call.func.id in ("getattr", "hasattr") and isinstance(call.args[0], ast.Name)
    ]
    return {name.value for owner, name, *_ in asked if owner.id == "self" and isinstance(name, ast.Constant)}


def test_the_seam_lists_every_name_of_trl_that_it_touches():
    sources = [inspect.getsource(owner) for owner in GRPOTrainer.__mro__ if owner.__module__[:3] in ("trl", "tra")]
    known = set(dir(GRPOTrainer)) | set(re.findall(r"\bself\.([A-Za-z_]\w*)", "".join(sources)))
    used = set()
    for module in (checkpoints, naming, prompts, rollouts):
        tree = ast.parse(inspect.getsource(module))
        used |= (attributes_of_a_trainer(tree) | names_asked_for(tree)) & known
    listed = {*versions.METHODS, *versions.ATTRIBUTES, *versions.LATER_ATTRIBUTES, *versions.OPTIONAL_ATTRIBUTES}
    assert used - DOCUMENTED - {"__init_subclass__"} == listed | set(versions.CLASS_ATTRIBUTES)


def test_the_seam_lists_what_it_sets_of_the_engine():
    tree = ast.parse(inspect.getsource(rollouts))
    engine = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "vllm_generation" in ast.dump(node.value)
    ]
    assert {node.attr for node in engine} == set(versions.ENGINE_ATTRIBUTES)


def test_the_seam_adds_no_public_name_that_trl_has():
    """A hook that TRL already has would silently change TRL."""
    seams = (rollouts.RolloutTrainer, prompts.PromptSeam, prompts.OrderAndLog)
    own = {name for seam in seams for name in vars(seam) if not name.startswith("_")}
    taken = {name for name in own if hasattr(GRPOTrainer, name)}
    assert not taken


def test_every_module_can_be_imported():
    for path in MODULES:
        if relative(path) == KERNEL and not importlib.util.find_spec("triton"):
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
