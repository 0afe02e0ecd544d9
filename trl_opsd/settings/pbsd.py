# SPDX-License-Identifier: Apache-2.0
"""Settings of PBSD (arXiv 2605.05040)."""

from dataclasses import dataclass

from .fields import option, require


@dataclass
class PBSDSettings:
    """What PBSD alone reads.

    The paper's beta and learning rate were not found: these are ours.
    """

    preference_beta: float = option(0.1, "beta: scales the margin between the two sequences, above 0.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.preference_beta > 0, self, "preference_beta", "a number above 0")
