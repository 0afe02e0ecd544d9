# SPDX-License-Identifier: Apache-2.0
"""No class reads an attribute that only its child sets: what a class reads of itself, it or a parent of it has."""

import ast
import importlib
import importlib.util
import inspect
import textwrap
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "trl_opsd"


def classes():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "sweep_kernel.py" and not importlib.util.find_spec("triton"):
            continue
        module = importlib.import_module(
            ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        )
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                yield value


@cache
def attributes(owner):
    """Names that a class's own code reads of `self`, and those that it makes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError):  # builtins
        return set(), set()
    own = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    own = [node for node in own if node.value.id == "self"]
    made = {node.attr for node in own if isinstance(node.ctx, ast.Store)}
    return {node.attr for node in own if isinstance(node.ctx, ast.Load)}, made


def missing_in(owner):
    has = set(dir(owner)) | {"__dict__", "__class__"}
    for parent in owner.__mro__:
        has |= attributes(parent)[1] | set(vars(parent).get("__annotations__", ()))
    return attributes(owner)[0] - has


@pytest.mark.parametrize("owner", list(classes()), ids=lambda c: c.__name__)
def test_a_class_reads_of_itself_what_it_or_a_parent_has(owner):
    assert not missing_in(owner)


def test_an_attribute_of_a_child_is_found():
    class Parent:
        def read(self):
            return self.value

    class Child(Parent):
        def __init__(self):
            self.value = 1

    assert missing_in(Parent) == {"value"} and not missing_in(Child)
