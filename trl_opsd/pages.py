# SPDX-License-Identifier: Apache-2.0
"""The methods, each a page: the one table from which commands, help, trainers and public names follow.

A page NAME is three modules: `settings/NAME.py` with its `...Settings`, `methods/NAME.py` with its rule and `Method`, and
`trainers/NAME.py` with its `...Config` and `...Trainer`. One whose formula is partly inferred has a room of its own,
`experimental/NAME/`, with `settings.py`, `method.py` and `trainer.py`. This table loads none of them.
"""

from importlib import import_module
from typing import Any, NamedTuple


class Page(NamedTuple):
    """A method's line of the table.

    Attributes:
        prefix: of its `...Settings`, `...Config` and `...Trainer`.
        help: what its command is said to do.
        experimental: parts of its formula are inferred.
    """

    prefix: str
    help: str
    experimental: bool = False


# name on the command line -> page; its modules have the name with underscores
PAGES = {
    "opsd": Page("OPSD", "the teacher reads question and solution (arXiv 2601.18734)"),
    "ogls-sd": Page("OGLSSD", "logits steered by right against wrong rollouts (arXiv 2605.12400)"),
    "purified-opsd": Page("PurifiedOPSD", "OPSD less what the solution alone says (arXiv 2607.02234)"),
    "sdpo": Page("SDPO", "the teacher reads a right peer, or what an environment reports (arXiv 2601.20802)"),
    "sdft": Page("SDFT", "a moving average reads the row's answer as an example (arXiv 2601.19897)"),
    "vpd": Page("VPD", "SDPO whose teacher learns to tell right from wrong now and then (arXiv 2605.15113)", True),
    "mopd": Page("MOPD", "the teacher reads two right peers and a wrong one (arXiv 2605.12652)"),
    "resd": Page("RESD", "the teacher reads the attempt, a reflection on it and a right one (arXiv 2605.12741)"),
    "demopsd": Page(
        "DemoPSD", "the teacher that reads a right peer is held back where it disagrees (arXiv 2607.02502)"
    ),
    "antisd": Page("AntiSD", "GRPO, away from tokens that a teacher with the answer favours (arXiv 2605.11609)"),
    "egrsd": Page("EGRSD", "a reward spread over tokens by what a sure teacher says (arXiv 2605.13255)", True),
    "sgsd": Page("SGSD", "several teachers with a skill each, judged by the outcome (arXiv 2605.28791)"),
    "rcsd": Page("RCSD", "the teacher reads a rubric and its own analysis of it (arXiv 2606.19327)"),
    "critique": Page(
        "CritiqueSD", "the teacher reads a critique of the very rollout that it scores (arXiv 2606.11173)"
    ),
    "pbsd": Page(
        "PBSD", "what is written with the solution is preferred to what is written without (arXiv 2605.05040)"
    ),
    "brts": Page("BRTS", "the best of several answers of the teacher is learnt too (arXiv 2605.09725)", True),
    "sort": Page("SORT", "GRPO, and the solution itself where every rollout is wrong (arXiv 2605.11505)", True),
    "ssopd": Page(
        "SSOPD", "GRPO, and the longest wrong rollout learns from the shortest right one (arXiv 2605.17497)", True
    ),
    "trace": Page("TRACE", "GRPO, and decisive spans are distilled for the first steps (arXiv 2605.10194)", True),
    "msd": Page("MSD", "safety in English is carried to the language of the request (arXiv 2605.02971)", True),
    "vopd": Page("VOPD", "the sampled token's log-ratio, less its mean under the student (arXiv 2605.07865)"),
    "rethinking-opd": Page("RethinkingOPD", "likely tokens rewarded by their log-ratio (arXiv 2604.13016)"),
    "popd": Page("POPD", "the sampled token's log-ratio on a growing part of the rollout (arXiv 2605.31490)"),
    "stableopd": Page(
        "StableOPD",
        "the sampled token's log-ratio, held by the solution and the first weights (arXiv 2604.08527)",
        experimental=True,
    ),
    "rlsd": Page("RLSD", "GRPO, its advantage spread over tokens by what a teacher says of them (arXiv 2604.03128)"),
    "rlrt": Page("RLRT", "GRPO that rewards right tokens which the teacher did not expect (arXiv 2605.10781)"),
    "dasd": Page(
        "DASD", "GRPO, sure tokens pulled to the teacher, others pushed away (arXiv 2605.22263)", experimental=True
    ),
}


def settings_of(name: str) -> type:
    """A method's own settings, a plain dataclass; loads neither torch nor trl."""
    return _part(name, "Settings")


def trainer_of(name: str) -> Any:
    """A method's trainer, which holds its `Method` and its config."""
    return _part(name, "Trainer")


def public_names() -> dict[str, str]:
    """Config and trainer of every method, and the module of the package that holds them."""
    return {
        f"{page.prefix}{kind}": _module(name, kind) for name, page in PAGES.items() for kind in ("Config", "Trainer")
    }


def _part(name: str, kind: str) -> Any:
    return getattr(import_module(f".{_module(name, kind)}", __package__), PAGES[name].prefix + kind)


def _module(name: str, kind: str) -> str:
    """The module of the package that holds a method's `Settings`, `Config` or `Trainer`."""
    own, is_settings = name.replace("-", "_"), kind == "Settings"
    if PAGES[name].experimental:
        return f"experimental.{own}.{'settings' if is_settings else 'trainer'}"
    return f"{'settings' if is_settings else 'trainers'}.{own}"
