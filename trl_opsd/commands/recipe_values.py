# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe's values are of the kinds that its settings take.

argparse reads texts alone: a list, a number or a boolean of YAML passes it by, and fails later in a place that names
neither the file nor the key.
"""

import enum
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError
from .arguments import read_recipe, recipe_place

_BOOLEANS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # as the parser reads texts
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}


def check_recipe_values(path: str, kinds: Iterable[type]) -> None:
    """Check every key of a recipe that a dataclass of `kinds` has.

    Raises:
        UsageError: names file, line, key, value and what the setting takes.
    """
    hints: dict[str, Any] = {}
    for kind in kinds:
        hints |= get_type_hints(kind)
    for key, value in read_recipe(path).items():
        if key in hints and not takes(hints[key], value):
            is_scalar = isinstance(value, (bool, int, float)) and takes(hints[key], "text")
            quotes = f' Write "{_as_written(value)}" in quotes if you mean the text.' if is_scalar else ""
            raise UsageError(f"{recipe_place(path, key)} is {value!r}, but takes {describe_kind(hints[key])}.{quotes}")
    env = read_recipe(path).get("env", {})
    if not isinstance(env, Mapping):
        raise UsageError(f"{recipe_place(path, 'env')} is {env!r}; write one `NAME: value` a line below it.")


def takes(hint: Any, value: Any) -> bool:
    """Whether a setting annotated with `hint` takes a YAML value, texts as the command line would write them too."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(takes(part, value) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = origin or hint
    if kind is type(None):
        return value is None
    if kind is list:
        return isinstance(value, (list, str))
    if kind is dict:
        return isinstance(value, (dict, str))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return value in [member.value for member in kind]
    return _takes_scalar(kind, value) if kind in _NAMES else True


def _takes_scalar(kind: type, value: Any) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind is bool:
        return isinstance(value, bool) or str(value).lower() in _BOOLEANS
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    if isinstance(value, float):
        return kind is float
    try:
        kind(value)
    except ValueError:
        return False
    return True


def describe_kind(hint: Any) -> str:
    """What a setting takes, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_kind(part) for part in arguments))
    if origin is Literal:
        return f"one of {arguments}"
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {[member.value for member in kind]}"
    return "null" if kind is type(None) else _NAMES.get(kind, "a list" if kind is list else str(kind))


def _as_written(value: Any) -> str:
    """A value as its author probably typed it: an unquoted `no` is false in YAML."""
    return {"True": "yes", "False": "no"}.get(str(value), str(value))
