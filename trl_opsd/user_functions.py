# SPDX-License-Identifier: Apache-2.0
"""Functions of the user's own that a setting names as `module:function`: verifiers, critics, annotators."""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def load_function(name: str, place: str, *, takes: str, allowed: str = "`module:function`") -> Callable:
    """The function that `module:function` names; modules of the working directory count too, as for TRL's rewards.

    Args:
        name: as the setting gives it.
        place: the setting, for the message.
        takes: what the function takes, for the message.
        allowed: what the setting may be.

    Raises:
        ValueError: there is no such function, or its `calls_at_once` is not 1 or more; names the setting.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{place}={name!r} is not {allowed}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{place}={name!r} is not {allowed}: {error}.") from error
    if not callable(function):
        raise ValueError(f"{place}={name!r} is a {type(function).__name__}; name a function of {takes}.")
    at_once = getattr(function, "calls_at_once", 1)
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"{place}={name!r} has calls_at_once={at_once!r}; set that attribute to 1 or more.")
    return function


def call_for_each(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    """What a function returns for each value, in their order; an exception that it raises stands in its result's place.

    Args:
        function: of one value. Its attribute `calls_at_once`, 1 where it has none, is how many calls may run at a time; above 1
            it is called from several threads.
        values: any number of them.
    """
    at_once = getattr(function, "calls_at_once", 1)

    def call(value: Any) -> Any:
        try:
            return function(value)
        except Exception as error:  # whatever it is: one value's failure must not end a run
            return error

    if at_once == 1:
        return [call(value) for value in values]
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(call, values))


def ask_function(name: str, place: str, values: Sequence[Any], *, takes: str, failing: str) -> list[Any]:
    """What the function that a setting names says of rollouts, see `load_function` and `call_for_each`; warns of what it raises.

    Args:
        name, place, takes: as in `load_function`.
        values: the rollouts.
        failing: what becomes of those on which it fails, behind "which", for the message.
    """
    results = call_for_each(load_function(name, place, takes=takes), values)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        warnings.warn(
            f"{place}={name!r} failed on {len(errors)} of {len(results)} rollouts, which {failing}; the run goes on. The first "
            f"error: {errors[0]!r}.",
            stacklevel=2,
        )
    return results


def said_of(rollouts: Sequence[Any], settings: Any, *, column: str, function: str, failing: str) -> list[Any]:
    """What the user's function, or without one a column of the row, says of each rollout; an error where the function fails.

    Args:
        rollouts: with `columns`.
        settings: hold the function's name, or None, under `function`.
        column, function: names of the column and of the setting.
        failing: as in `ask_function`.
    """
    name = getattr(settings, function)
    if name is None:
        return [rollout.columns.get(column) for rollout in rollouts]
    return ask_function(name, function, rollouts, takes="a rollout", failing=failing)
