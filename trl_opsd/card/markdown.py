# SPDX-License-Identifier: Apache-2.0
"""Names and settings as Markdown that shows them and does nothing else, and as Python that a reader can paste."""

import ast
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

# Underscores within a word, which model names have, are letters.
_MARKUP = re.compile(r"[\\`*\[\]<>|~#!&]|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    """A name as text of one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def hub_link(name: str, kind: str = "") -> str:
    """A link to a model of the Hub, or to something else whose addresses begin with `kind`."""
    return f"[{escaped(name)}](https://huggingface.co/{kind}{quote(name)})"


def code_span(text: str) -> str:
    """Text of one line in backticks, more of them than stand together in it."""
    text = " ".join(text.split("\n"))
    marks = "`" * (1 + _longest_run(text))
    return f"{marks} {text} {marks}" if "`" in text else f"{marks}{text}{marks}"


def fenced(text: str) -> str:
    """Text as it is, between fences that it cannot end."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}text\n{text}\n{fence}"


def as_json(value: Any) -> str:
    """JSON in a code span; what JSON has no form for, such as a date of a recipe, is text."""
    return code_span(json.dumps(value, default=str))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: Any) -> str:
    """A setting's value as a cell of a table."""
    return escaped(str(getattr(value, "value", value)).replace("\n", "\\n"))


def keyword_arguments(values: Mapping[str, Any]) -> str:
    """Source of further arguments of a call: `key=value` each, or one `**{...}` where a key is no name of Python's."""
    literals = {key: _literal(value) for key, value in values.items()}
    if all(key.isidentifier() and not keyword.iskeyword(key) for key in literals):
        return "".join(f", {key}={value}" for key, value in literals.items())
    return f", **{{{', '.join(f'{key!r}: {value}' for key, value in literals.items())}}}"


def _literal(value: Any) -> str:
    """Source of a value; of its text where it has none of its own, which is what a template prints of it."""
    try:
        ast.literal_eval(repr(value))
    except (ValueError, SyntaxError):
        return repr(str(value))
    return repr(value)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
