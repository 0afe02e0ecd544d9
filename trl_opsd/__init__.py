# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation for TRL.

Importing the package is cheap: torch, transformers and trl load when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

_HOME_OF = {
    "OGLSSDConfig": "trainers.ogls_sd",
    "OGLSSDTrainer": "trainers.ogls_sd",
    "OPSDConfig": "config",
    "OPSDTrainer": "trainers.opsd",
    "OPSDGKDConfig": "trainers.gkd",
    "OPSDGKDTrainer": "trainers.gkd",
    "PurifiedOPSDConfig": "trainers.purified_opsd",
    "PurifiedOPSDTrainer": "trainers.purified_opsd",
    "Method": "methods",
    "accuracy_reward": "rewards",
    "UnsupportedTRLError": "_trl",
}

__all__ = [
    "Method",
    "OGLSSDConfig",
    "OGLSSDTrainer",
    "OPSDConfig",
    "OPSDGKDConfig",
    "OPSDGKDTrainer",
    "OPSDTrainer",
    "PurifiedOPSDConfig",
    "PurifiedOPSDTrainer",
    "UnsupportedTRLError",
    "accuracy_reward",
]

if TYPE_CHECKING:
    from ._trl import UnsupportedTRLError
    from .config import OPSDConfig
    from .methods import Method
    from .rewards import accuracy_reward
    from .trainers.gkd import OPSDGKDConfig, OPSDGKDTrainer
    from .trainers.ogls_sd import OGLSSDConfig, OGLSSDTrainer
    from .trainers.opsd import OPSDTrainer
    from .trainers.purified_opsd import PurifiedOPSDConfig, PurifiedOPSDTrainer


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
