# SPDX-License-Identifier: Apache-2.0
"""Settings of the methods that learn from the sampled token by a policy gradient, without TRL's own loss."""

from dataclasses import dataclass

from .fields import option, pin, require


@dataclass
class SampledTokenSettings:
    """Tokens are drawn from the whole distribution that the loss differentiates, and PPO's clip bounds their ratio.

    Cut sampling (top-p, top-k) or another temperature would bias the gradient: what is drawn stands for the student itself.
    """

    # Fields of TRL's policy-gradient loss that are read here too, whatever `reward_weight` is.
    policy_fields = ("epsilon", "epsilon_high", "delta")

    temperature: float = option(1.0, "Sampling temperature of the rollouts, and of the loss.")
    top_p: float = option(1.0, "Nucleus sampling: probability mass kept, in (0, 1]; below 1 the gradient is biased.")
    top_k: int = option(0, "Sampling among the k likeliest tokens; 0 for all, others bias the gradient.")
    divergence: str = option("reverse_kl", "What the policy gradient descends; no other is possible.")
    clip: str | None = option(None, "Nothing else is possible: rewards of tokens are not clipped.")
    epsilon: float = option(0.2, "PPO's clip of the ratio to the policy that sampled, on both sides, 0 or more.")
    epsilon_high: float | None = option(None, "PPO's clip above; None for `epsilon`.")
    delta: float | None = option(
        None, "Ratios above this have no gradient for a punished token either (dual clip); None for no bound."
    )
    engine_weight_cap: float | None = option(
        None, "Tokens weigh by trainer over vLLM, at most this; None does not correct for the engine."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        pin(self, "divergence", type(self).divergence, "the rewards of tokens make its gradient")
        pin(self, "clip", None, "there are no terms of a divergence to clip")
        require(self.epsilon >= 0, self, "epsilon", "0 or more")
        require(self.epsilon_high is None or self.epsilon_high >= 0, self, "epsilon_high", "0 or more, or None")
        require(self.delta is None or self.delta > 1, self, "delta", "a number above 1, or None")
        cap = self.engine_weight_cap
        require(cap is None or cap > 0, self, "engine_weight_cap", "a number above 0, or None")
