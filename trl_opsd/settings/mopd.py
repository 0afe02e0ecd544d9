# SPDX-License-Identifier: Apache-2.0
"""Settings of MOPD (arXiv 2605.12652)."""

from dataclasses import dataclass

from ..rows.texts import check_template
from .fields import option, require
from .sdpo import SDPOSettings

WRONG_BLOCK = """

An attempt that was found wrong stands between the two marks. Do not repeat its mistakes.

=== Failed attempt begins ===
{text}
=== Failed attempt ends ==="""


@dataclass
class MOPDSettings(SDPOSettings):
    """Defaults of the paper's run that differ from SDPO's, and what MOPD alone reads."""

    max_completion_length: int | None = option(4096, "Longest rollout in tokens.")
    strip_thinking: bool = option(False, "Remove think blocks from the rollouts that the teacher reads.")
    max_right_peers: int = option(2, "Most right peers that the teacher reads, the first ones, 0 or more.")
    max_wrong_peers: int = option(1, "Most wrong peers that the teacher reads, drawn at random, 0 or more.")
    wrong_block: str = option(WRONG_BLOCK, "What stands around a wrong peer, `{text}`.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        for name in ("max_right_peers", "max_wrong_peers"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        check_template("wrong_block", self.wrong_block, "{text}")
