# SPDX-License-Identifier: Apache-2.0
"""Settings of vOPD (arXiv 2605.07865)."""

from dataclasses import dataclass
from typing import Any

from .fields import option, require
from .sampled import SampledTokenSettings


@dataclass
class VOPDSettings(SampledTokenSettings):
    """Defaults of the paper that differ from OPSD's, and what vOPD alone reads.

    The sampling temperature, the gradient's norm and PPO's clip are ours. The paper has the baseline over the vocabulary and over
    the student's 100 likeliest tokens; which one its runs take is not known to us, and the whole one costs nothing more here.
    """

    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    gradient_accumulation_steps: int = option(16, "Micro-batches per optimizer step.")
    max_completion_length: int | None = option(2048, "Longest rollout in tokens.")
    use_baseline: bool = option(True, "Take the mean of the log-ratio under the student away from it.")
    baseline_size: int | None = option(
        None, "The mean is over so many of the student's likeliest tokens, both sides renormalised; None for all."
    )
    ratio_floor_share: float | None = option(
        None,
        "l in (0, 1): the log-ratio is at least log(l / (1 - l)), without the baseline alone. None for no floor.",
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        size, share = self.baseline_size, self.ratio_floor_share
        require(size is None or size >= 1, self, "baseline_size", "1 or more, or None")
        require(share is None or 0 < share < 1, self, "ratio_floor_share", "a number in (0, 1), or None")
        if share is not None and self.use_baseline:
            raise ValueError(
                f"ratio_floor_share={share} with use_baseline=True: the mean is that of the log-ratio without a floor. Set "
                "use_baseline=False, or ratio_floor_share=None."
            )
        if size is not None and not self.use_baseline:
            raise ValueError(f"baseline_size={size} with use_baseline=False: nothing reads it. Set baseline_size=None.")

    def divergence_limits(self) -> dict[str, Any]:
        """The student's likeliest tokens alone."""
        from ..losses import Support

        size = self.baseline_size
        return {"support": None if size is None else Support(size, remainder="renormalise")}
