# SPDX-License-Identifier: Apache-2.0
"""How a setting is declared and checked."""

from dataclasses import field
from typing import Any


def option(default: Any, help_text: str) -> Any:
    """A field with a default and its help text."""
    factory = isinstance(default, (dict, list))
    keywords = {"default_factory": lambda: default.copy()} if factory else {"default": default}
    return field(metadata={"help": help_text}, **keywords)


def teacher_kind(default: str) -> Any:
    """The field `teacher_model_kind`, of which methods have their own defaults."""
    return option(
        default,
        "Whose weights the teacher has: `base` the initial ones, `live` the student's, `ema` a moving average.",
    )


def require(holds: Any, settings: Any, name: str, wanted: str) -> None:
    """Raise a ValueError that names the field, its value and what to set, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={getattr(settings, name)!r} is not valid; set it to {wanted}.")


def pin(settings: Any, name: str, only: Any, reason: str) -> None:
    """Raise a ValueError that names the field, its value and the reason, unless it has the `only` value that a method allows."""
    value = getattr(settings, name)
    if value != only:
        raise ValueError(f"{name}={value!r} is not possible here: {reason}. Leave it {only!r}.")


def check_settings(config: Any) -> None:
    """Run the `check` that each class of a config declares: the method's own first, for the shared ones build on it.

    Raises:
        ValueError: a setting is outside its range; names the field, its value and what to set instead.
    """
    for owner in type(config).__mro__:
        if "check" in vars(owner):
            owner.check(config)
