# SPDX-License-Identifier: Apache-2.0
"""The numbers that d-OPSD logs, as means over prompts or over states of all processes."""

from collections.abc import Callable, Mapping, Sequence

import torch

from .drawing import REASONS, Sample

_OF_SAMPLES = (
    "samples/right",
    "samples/first_right",
    "samples/drawn",
    "completions/mean_length",
    "rows/used",
    *(f"rows/{reason}" for reason in REASONS),
)
_OF_STATES = ("divergence", "clipped_share", "top_token_agreement")
NAMES = (*_OF_SAMPLES, *_OF_STATES, "states/trained")


class Means:
    """Sums and counts of every name since they were last read."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._sums = {name: 0.0 for name in NAMES}
        self._counts = {name: 0.0 for name in NAMES}

    def add(self, facts: Mapping[str, torch.Tensor]) -> None:
        """Add values (n,) of states, and `states/trained` (B,) of prompts."""
        for name, values in facts.items():
            self._sums[name] = self._sums[name] + values.sum()
            self._counts[name] += len(values)

    def add_samples(self, samples: Sequence[Sample]) -> None:
        """Add what was sampled."""
        for sample in samples:
            is_right = sample.reason in (None, "too_few_states")
            values = {
                "samples/right": is_right,
                "samples/first_right": is_right and sample.num_drawn == 1,
                "samples/drawn": sample.num_drawn,
                "completions/mean_length": sample.num_tokens,
                "rows/used": sample.reason is None,
                **{f"rows/{reason}": sample.reason == reason for reason in REASONS},
            }
            for name, value in values.items():
                self._sums[name] = self._sums[name] + float(value)
                self._counts[name] += 1

    def reduced(self, over_ranks: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """Means over all processes of what was added, which is then forgotten; without names that have no value.

        Args:
            over_ranks: adds a tensor up.
            device: of the tensor.
        """
        sums = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in self._sums.values()]
        counts = torch.tensor(list(self._counts.values()), device=device)
        sums, counts = over_ranks(torch.cat([torch.stack(sums), counts])).chunk(2)
        self._reset()
        means = zip(NAMES, sums.tolist(), counts.tolist(), strict=True)
        return {name: value / count for name, value, count in means if count}
