# SPDX-License-Identifier: Apache-2.0
"""Settings of EGRSD and CL-EGRSD (arXiv 2605.13255)."""

from dataclasses import dataclass

from ...settings.fields import option, require


@dataclass
class EGRSDSettings:
    """Defaults of the paper that differ from OPSD's, and what EGRSD alone reads.

    e and b are not in the paper as we know it: 0.2, as RLSD has it, and 0.1 are ours; so is that a batch's own rewards
    are among those it is put to scale by. `lookahead_tokens=5` is CL-EGRSD.
    """

    clip: str | None = option(None, "Without effect: there is no divergence to clip.")
    evidence_bound: float = option(0.2, "e: the log-ratio moves a token's weight by at most this, in [0, 1].")
    entropy_gate_strength: float = option(
        0.1,
        "gamma: how much less a token weighs where the teacher is least sure, 0 or more; the paper's is 0.1 to 0.3.",
    )
    entropy_gate_floor: float = option(0.1, "Smallest gate, in [0, 1]; it acts where gamma is above 1 less this.")
    lookahead_tokens: int = option(
        0, "CL-EGRSD's W: a token is gated by the smallest entropy of it and the next so many; the paper's is 5."
    )
    brevity_bonus: float = option(0.1, "b: a right rollout of length 0 would get so much more reward, 0 or more.")
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(0 <= self.evidence_bound <= 1, self, "evidence_bound", "a number in [0, 1]")
        require(self.entropy_gate_strength >= 0, self, "entropy_gate_strength", "0 or more")
        require(0 <= self.entropy_gate_floor <= 1, self, "entropy_gate_floor", "a number in [0, 1]")
        require(self.lookahead_tokens >= 0, self, "lookahead_tokens", "0 or more")
        require(self.brevity_bonus >= 0, self, "brevity_bonus", "0 or more")
