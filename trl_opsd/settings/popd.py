# SPDX-License-Identifier: Apache-2.0
"""Settings of POPD and TOPD (arXiv 2605.31490)."""

from dataclasses import dataclass

from .fields import option, pin
from .sampled import SampledTokenSettings


@dataclass
class POPDSettings(SampledTokenSettings):
    """Defaults that differ from OPSD's. One number as `distillation_length` is TOPD.

    None of the paper's settings were found: the schedule, its ends and the learning rate are ours.
    """

    distillation_length: int | str | None = option(
        "256..1024 in 50",
        "H, the first tokens of a rollout that are distilled: `256..1024 in 50` grows from 256 to 1024 over 50 optimizer steps "
        "(POPD), and sampling then stops there too where nothing trains on rewards; one number is TOPD; None for all.",
    )
    mask_truncated_completions: bool = option(
        False, "Nothing else is possible: rollouts are cut at the horizon by design, and count."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        pin(self, "mask_truncated_completions", False, "rollouts that are cut at the horizon would be left out")
