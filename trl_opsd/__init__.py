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
    "OPSDConfig": "trainers.config",
    "OPSDTrainer": "trainers.opsd",
    "OPSDGKDConfig": "experimental.gkd",
    "OPSDGKDTrainer": "experimental.gkd",
    "PurifiedOPSDConfig": "trainers.purified_opsd",
    "PurifiedOPSDTrainer": "trainers.purified_opsd",
    "CollapseGuard": "monitoring.guard",
    "EvaluationCallback": "evaluation.callback",
    "Method": "methods",
    "Rollout": "teacher.contexts",
    "SelfDistillationTrainer": "trainers.self_distillation",
    "TeacherContext": "teacher.contexts",
    "accuracy_reward": "rewards",
    "UnsupportedTRLError": "_trl.versions",
}

__all__ = [
    "CollapseGuard",
    "EvaluationCallback",
    "Method",
    "OGLSSDConfig",
    "OGLSSDTrainer",
    "OPSDConfig",
    "OPSDGKDConfig",
    "OPSDGKDTrainer",
    "OPSDTrainer",
    "PurifiedOPSDConfig",
    "PurifiedOPSDTrainer",
    "Rollout",
    "SelfDistillationTrainer",
    "TeacherContext",
    "UnsupportedTRLError",
    "accuracy_reward",
]

if TYPE_CHECKING:
    from ._trl.versions import UnsupportedTRLError
    from .evaluation.callback import EvaluationCallback
    from .experimental.gkd import OPSDGKDConfig, OPSDGKDTrainer
    from .methods import Method
    from .monitoring.guard import CollapseGuard
    from .rewards import accuracy_reward
    from .teacher.contexts import Rollout, TeacherContext
    from .trainers.config import OPSDConfig
    from .trainers.ogls_sd import OGLSSDConfig, OGLSSDTrainer
    from .trainers.opsd import OPSDTrainer
    from .trainers.purified_opsd import PurifiedOPSDConfig, PurifiedOPSDTrainer
    from .trainers.self_distillation import SelfDistillationTrainer


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
