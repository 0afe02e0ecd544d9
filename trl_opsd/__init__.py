# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation for TRL.

Importing the package is cheap: torch, transformers and trl load when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .pages import public_names

__version__ = "0.1.0.dev0"

_HOME_OF = {
    **public_names(),
    "CollapseGuard": "monitoring.guard",
    "EvaluationCallback": "evaluation.callback",
    "Method": "methods",
    "OPSDGKDConfig": "experimental.gkd",
    "OPSDGKDTrainer": "experimental.gkd",
    "Rollout": "teacher.contexts",
    "SelfDistillationTrainer": "trainers.self_distillation",
    "TeacherContext": "teacher.contexts",
    "UnsupportedTRLError": "_trl.versions",
    "accuracy_reward": "rewards",
}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:  # for editors and type checkers, to which `X as X` says that X is public
    from ._trl.versions import UnsupportedTRLError as UnsupportedTRLError
    from .evaluation.callback import EvaluationCallback as EvaluationCallback
    from .experimental.brts.trainer import BRTSConfig as BRTSConfig
    from .experimental.brts.trainer import BRTSTrainer as BRTSTrainer
    from .experimental.dasd.trainer import DASDConfig as DASDConfig
    from .experimental.dasd.trainer import DASDTrainer as DASDTrainer
    from .experimental.egrsd.trainer import EGRSDConfig as EGRSDConfig
    from .experimental.egrsd.trainer import EGRSDTrainer as EGRSDTrainer
    from .experimental.gkd import OPSDGKDConfig as OPSDGKDConfig
    from .experimental.gkd import OPSDGKDTrainer as OPSDGKDTrainer
    from .experimental.msd.trainer import MSDConfig as MSDConfig
    from .experimental.msd.trainer import MSDTrainer as MSDTrainer
    from .experimental.sort.trainer import SORTConfig as SORTConfig
    from .experimental.sort.trainer import SORTTrainer as SORTTrainer
    from .experimental.ssopd.trainer import SSOPDConfig as SSOPDConfig
    from .experimental.ssopd.trainer import SSOPDTrainer as SSOPDTrainer
    from .experimental.stableopd.trainer import StableOPDConfig as StableOPDConfig
    from .experimental.stableopd.trainer import StableOPDTrainer as StableOPDTrainer
    from .experimental.trace.trainer import TRACEConfig as TRACEConfig
    from .experimental.trace.trainer import TRACETrainer as TRACETrainer
    from .experimental.vpd.trainer import VPDConfig as VPDConfig
    from .experimental.vpd.trainer import VPDTrainer as VPDTrainer
    from .methods import Method as Method
    from .monitoring.guard import CollapseGuard as CollapseGuard
    from .rewards import accuracy_reward as accuracy_reward
    from .teacher.contexts import Rollout as Rollout
    from .teacher.contexts import TeacherContext as TeacherContext
    from .trainers.antisd import AntiSDConfig as AntiSDConfig
    from .trainers.antisd import AntiSDTrainer as AntiSDTrainer
    from .trainers.critique import CritiqueSDConfig as CritiqueSDConfig
    from .trainers.critique import CritiqueSDTrainer as CritiqueSDTrainer
    from .trainers.demopsd import DemoPSDConfig as DemoPSDConfig
    from .trainers.demopsd import DemoPSDTrainer as DemoPSDTrainer
    from .trainers.mopd import MOPDConfig as MOPDConfig
    from .trainers.mopd import MOPDTrainer as MOPDTrainer
    from .trainers.ogls_sd import OGLSSDConfig as OGLSSDConfig
    from .trainers.ogls_sd import OGLSSDTrainer as OGLSSDTrainer
    from .trainers.opsd import OPSDConfig as OPSDConfig
    from .trainers.opsd import OPSDTrainer as OPSDTrainer
    from .trainers.pbsd import PBSDConfig as PBSDConfig
    from .trainers.pbsd import PBSDTrainer as PBSDTrainer
    from .trainers.popd import POPDConfig as POPDConfig
    from .trainers.popd import POPDTrainer as POPDTrainer
    from .trainers.purified_opsd import PurifiedOPSDConfig as PurifiedOPSDConfig
    from .trainers.purified_opsd import PurifiedOPSDTrainer as PurifiedOPSDTrainer
    from .trainers.rcsd import RCSDConfig as RCSDConfig
    from .trainers.rcsd import RCSDTrainer as RCSDTrainer
    from .trainers.resd import RESDConfig as RESDConfig
    from .trainers.resd import RESDTrainer as RESDTrainer
    from .trainers.rethinking_opd import RethinkingOPDConfig as RethinkingOPDConfig
    from .trainers.rethinking_opd import RethinkingOPDTrainer as RethinkingOPDTrainer
    from .trainers.rlrt import RLRTConfig as RLRTConfig
    from .trainers.rlrt import RLRTTrainer as RLRTTrainer
    from .trainers.rlsd import RLSDConfig as RLSDConfig
    from .trainers.rlsd import RLSDTrainer as RLSDTrainer
    from .trainers.sdft import SDFTConfig as SDFTConfig
    from .trainers.sdft import SDFTTrainer as SDFTTrainer
    from .trainers.sdpo import SDPOConfig as SDPOConfig
    from .trainers.sdpo import SDPOTrainer as SDPOTrainer
    from .trainers.self_distillation import SelfDistillationTrainer as SelfDistillationTrainer
    from .trainers.sgsd import SGSDConfig as SGSDConfig
    from .trainers.sgsd import SGSDTrainer as SGSDTrainer
    from .trainers.vopd import VOPDConfig as VOPDConfig
    from .trainers.vopd import VOPDTrainer as VOPDTrainer


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
