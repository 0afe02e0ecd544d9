# SPDX-License-Identifier: Apache-2.0
"""Whose a word of the command line or a key of a recipe is: the trainer's, accelerate's launcher's, or nobody's."""

import argparse
import atexit
import difflib
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .help_text import own_settings

# Names of environment variables whose values are nobody's to read in a log.
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
# Of the parser of `accelerate launch`, but not options of a run of ours.
_NOT_LAUNCHER = {"training_script", "training_script_args", "module", "no_python", "config_file"}


# Of `--thinking`: keyword arguments of the chat template.
THINKING = {"on": {"enable_thinking": True}, "off": {"enable_thinking": False}, "default": {}}


class CommandParser(argparse.ArgumentParser):
    """A parser of a command's words whose complaint is one line, without the options in front of it."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        """Raise the complaint.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}. `--help` lists the options.")


@dataclass(frozen=True)
class CommandLine:
    """A command line taken apart.

    Attributes:
        own: words for the trainer's parser, `--config` among them.
        launcher: words for `accelerate launch`, those of the recipe first, so that the command line's win.
        unread: keys of the recipe that only other methods read.
    """

    own: list[str]
    launcher: list[str]
    unread: list[str]


def read_command_line(arguments: Sequence[str], types: Iterable[type]) -> CommandLine:
    """Take a command line and the recipe of its `--config` apart.

    Args:
        arguments: words behind the command's name.
        types: dataclasses whose fields the trainer's parser knows.

    Raises:
        UsageError: a word that neither the trainer nor the launcher knows, or a key that no method knows either; names
            the nearest.
    """
    own_names = field_names(types)
    own, launcher = [], []
    for name, words in split_options(arguments):
        if name in own_names:
            own += words
        else:
            _check_launcher_name(name, words[0], own_names)
            launcher += words
    recipe = option_value(own, "config")
    launched, unread = ([], []) if recipe is None else _others_of_recipe(recipe, own_names)
    return CommandLine(own, [*launched, *launcher], unread)


def split_options(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name and words of every option, in order; `--config=FILE` is written as two words.

    Raises:
        UsageError: a word stands before the first option.
    """
    options: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            is_config = name == "config" and equals
            options.append((name.replace("-", "_"), ["--config", value] if is_config else [word]))
        elif options:
            options[-1][1].append(word)
        else:
            raise UsageError(f"{word!r} belongs to no option. Options are written `--name value`.")
    return options


def field_names(types: Iterable[type]) -> set[str]:
    """Names that a parser of these dataclasses takes."""
    known = [field for kind in types for field in fields(kind) if field.init]
    negated = {f"no_{field.name}" for field in known if field.default is True}
    return {field.name for field in known} | negated | {"config", "help"}


@cache
def launcher_names() -> frozenset[str]:
    """Names of the options of `accelerate launch`, and `accelerate_config`, which is ours for its `config_file`."""
    from accelerate.commands.launch import launch_command_parser

    options = set(vars(launch_command_parser().parse_args(["script"])))
    return frozenset(options - _NOT_LAUNCHER | {"accelerate_config"})


@cache
def method_names() -> frozenset[str]:
    """Names of the settings of every method and baseline."""
    from trl import GRPOConfig, SFTConfig

    return frozenset(field_names((GRPOConfig, SFTConfig)) | own_settings())


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The name a user may have meant, None if none is close."""
    swapped = [other for other in sorted(known) if sorted(other) == sorted(name)]  # ospd is opsd, not vopd
    return next(iter([*swapped, *difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)]), None)


def read_recipe(path: str) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises:
        UsageError: there is no such file, it is no YAML (names the line), or it holds something else.
    """
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"--config {path}: no such file.")
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"--config {path}{line}: it is no YAML ({getattr(error, 'problem', None) or error}). Write one `key: value` "
            "a line, texts with special characters in quotes."
        ) from error
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path}: holds a {type(recipe).__name__}; write one `key: value` a line.")
    return recipe


def join_recipes(arguments: Sequence[str]) -> list[str]:
    """The words with one `--config` in place of several, whose file holds the keys of all; a later file's win.

    Raises:
        UsageError: see `read_recipe`.
    """
    words, paths = [], []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--config":
            paths.append(value if equals else next(rest, ""))
        else:
            words.append(word)
    if len(paths) < 2:
        return list(arguments)
    import yaml

    joined = {key: value for path in paths for key, value in read_recipe(path).items()}
    folder = Path(tempfile.mkdtemp(prefix="trl_opsd-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / f"{'+'.join(Path(path).stem for path in paths)}.yaml"  # which an error names
    file.write_text(yaml.safe_dump(joined, sort_keys=False, allow_unicode=True), encoding="utf-8")
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    return [*words[:first], "--config", str(file), *words[first:]]


def recipe_place(path: str, key: str) -> str:
    """Where a key stands in a YAML file: `recipe.yaml, line 3: key`."""
    import yaml

    root = yaml.compose(Path(path).read_text(encoding="utf-8"))
    lines = {name.value: name.start_mark.line + 1 for name, _ in root.value}
    return f"{path}, line {lines.get(key, '?')}: {key}"


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The value that an option was last given, None if it was not."""
    values = [words for option, words in split_options(arguments) if option == name]
    if not values:
        return None
    _, equals, value = values[-1][0].partition("=")
    return value if equals else " ".join(values[-1][1:])


def given_value(arguments: Sequence[str], name: str) -> Any:
    """What an option was last given, or else its key of the recipe of `--config`; None without either."""
    value, recipe = option_value(arguments, name), option_value(arguments, "config")
    return read_recipe(recipe).get(name) if value is None and recipe is not None else value


def environment_of(arguments: Sequence[str]) -> str | None:
    """A sentence on the environment variables that the recipe's `env` sets, secrets hidden; None where it sets none."""
    variables = given_value(arguments, "env")
    if not variables or not isinstance(variables, dict):
        return None
    shown = [
        f"{name}={'(hidden)' if _SECRET.search(str(name)) else repr(str(value))}" for name, value in variables.items()
    ]
    return f"The recipe's `env` sets {', '.join(shown)} for this process and every program that it starts."


def _others_of_recipe(path: str, own_names: set[str]) -> tuple[list[str], list[str]]:
    """Of the keys that are not the trainer's: the launcher's as its words, and those that only other methods read."""
    words: list[str] = []
    unread = []
    for key, value in read_recipe(path).items():
        if key in own_names or key == "env":
            continue
        if key not in launcher_names() and key in method_names():
            unread.append(key)
            continue
        _check_launcher_name(key, recipe_place(path, key), own_names)
        if value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{key}", *map(str, values)]
    return words, unread


def _check_launcher_name(name: str, place: str, own_names: set[str]) -> None:
    known = launcher_names()
    if name in known:
        return
    if name in method_names():
        raise UsageError(f"{place} is a setting of another method, which this one does not read. Leave it out.")
    near = nearest_name(name, own_names | known | method_names())
    hint = f" Did you mean `{near}`?" if near else ""
    raise UsageError(f"{place} is not known.{hint} `--help` lists the settings, `--help_all` every one of TRL's too.")


def check_writable(folder: str | Path) -> None:
    """Make a folder and a file in it: what cannot be saved is not to be found out after the training.

    Raises:
        OSError: names the folder or the file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")
