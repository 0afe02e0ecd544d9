# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation for TRL.

Importing the package is cheap: torch, transformers and trl load when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

_HOME_OF = {
    "OPSDConfig": "config",
    "OPSDTrainer": "trainers.opsd",
    "Method": "methods",
    "OPSD": "methods",
    "accuracy_reward": "rewards",
    "UnsupportedTRLError": "_trl",
}

__all__ = ["OPSD", "Method", "OPSDConfig", "OPSDTrainer", "UnsupportedTRLError", "accuracy_reward"]

if TYPE_CHECKING:
    from ._trl import UnsupportedTRLError
    from .config import OPSDConfig
    from .methods import OPSD, Method
    from .rewards import accuracy_reward
    from .trainers.opsd import OPSDTrainer


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
