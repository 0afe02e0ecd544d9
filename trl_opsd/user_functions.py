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
        ValueError: there is no such function; names the setting.
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
    return function


def call_for_each(function: Callable[[Any], Any], values: Sequence[Any], *, at_once: int = 1) -> list[Any]:
    """What a function returns for each value, in their order; an exception that it raises stands in its result's place.

    Args:
        function: of one value; called from several threads where `at_once` is above 1.
        values: any number of them.
        at_once: calls that may run at a time, >= 1.
    """

    def call(value: Any) -> Any:
        try:
            return function(value)
        except Exception as error:  # whatever it is: one value's failure must not end a run
            return error

    if at_once == 1:
        return [call(value) for value in values]
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(call, values))


def ask_function(
    name: str, place: str, values: Sequence[Any], *, takes: str, failing: str, at_once: int = 1
) -> list[Any]:
    """What the function that a setting names says of rollouts, see `load_function` and `call_for_each`; warns of what it raises.

    Args:
        name, place, takes: as in `load_function`.
        values: the rollouts.
        failing: what becomes of those on which it fails, behind "which", for the message.
        at_once: as in `call_for_each`.
    """
    results = call_for_each(load_function(name, place, takes=takes), values, at_once=at_once)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        warnings.warn(
            f"{place}={name!r} failed on {len(errors)} of {len(results)} rollouts, which {failing}; the run goes on. The first "
            f"error: {errors[0]!r}.",
            stacklevel=2,
        )
    return results
