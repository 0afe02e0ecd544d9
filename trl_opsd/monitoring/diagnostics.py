# SPDX-License-Identifier: Apache-2.0
"""Sums behind the numbers every run logs (METHODS of the docs, "Diagnostics").

Sums stay on the device and are reduced over ranks once a logging interval, so a micro-batch costs no synchronisation.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..losses import FusedDiagnostics, OutputHead, SignalDecomposition, clip_agreement, decompose_signal

# Positions whose three views are held as logits at once.
_TILE_TOKENS = 64

# First completion position of each bucket; the first token stands apart, thinking templates disagree most there.
BUCKETS = {"first_token": (0, 1), "1-15": (1, 16), "16-127": (16, 128), "128-1023": (128, 1024), "1024+": (1024, None)}

# Rollouts whose reward reaches the threshold, and those whose reward does not.
OUTCOMES = {"right": 1, "wrong": 0}

_MEANS = (
    "divergence",
    "clipped_share",
    "student_entropy",
    "target_entropy",
    "top_token_agreement",
)

# Tokens and sums of them, and of buckets and outcomes; the last three are the clip's products.
_NUM_SUMS = 1 + len(_MEANS) + 2 * (len(BUCKETS) + len(OUTCOMES)) + 3

# Means over tokens that only some methods have: of a term on extras, before its weight; of a divergence from a reference.
_OTHERS = ("extras/loss", "reference_divergence")


def log_values(stats: FusedDiagnostics) -> dict[str, torch.Tensor]:
    """The kernel's diagnostics under the names of the log."""
    return {
        "divergence": stats.unclipped,
        "clipped_share": stats.clipped_share,
        "student_entropy": stats.student_entropy,
        "target_entropy": stats.target_entropy,
        "top_token_agreement": stats.top_agreement,
    }


class Diagnostics:
    """Token-weighted sums of one logging interval."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: torch.Tensor | None = None
        self._others: torch.Tensor | None = None
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._clocks: dict[str, list] = {}

    def add(
        self,
        values: dict[str, torch.Tensor],
        mask: torch.Tensor,
        rows: torch.Tensor,
        clip_products: torch.Tensor | None = None,
        outcomes: torch.Tensor | None = None,
    ) -> None:
        """Add a micro-batch.

        Args:
            values: (B, D) per name of `_MEANS`, detached.
            mask: (B, D), nonzero on distilled positions.
            rows: (B,) index of each rollout in the world's generation batch.
            clip_products: (3,) of `clip_gradient_products`, where they were measured.
            outcomes: (B,) of `OUTCOMES`, any other number for a rollout without a reward.
        """
        mask = mask.to(torch.float64)
        columns = [mask.sum(), *((values[name] * mask).sum() for name in _MEANS)]
        for first, last in BUCKETS.values():
            part = mask[:, first:last]
            columns += [part.sum(), (values["divergence"][:, first:last] * part).sum()]
        for outcome in OUTCOMES.values():
            part = torch.zeros_like(mask) if outcomes is None else mask * (outcomes == outcome).unsqueeze(1)
            columns += [part.sum(), (values["divergence"] * part).sum()]
        columns += [mask.new_zeros(())] * 3 if clip_products is None else clip_products.to(mask.dtype).unbind()
        sums = torch.stack(columns)
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows.append((rows, (values["divergence"] * mask).sum(1) / mask.sum(1).clamp(min=1)))

    def add_mean(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add numbers (n,) of a micro-batch, detached, to the mean `name` of `_OTHERS`, where `mask` (n,) is not 0."""
        mask = mask.to(torch.float64)
        sums = mask.new_zeros(len(_OTHERS), 2)
        sums[_OTHERS.index(name)] = torch.stack([mask.sum(), (values * mask).sum()])
        self._others = sums if self._others is None else self._others + sums

    def state(self) -> list[float] | None:
        """The sums so far, for a checkpoint; clocks and rows start anew."""
        if self._sums is None:
            return None
        return self._sums.tolist() + ([] if self._others is None else self._others.flatten().tolist())

    def restore(self, state: list[float] | None, device: torch.device) -> None:
        """Continue from `state`."""
        self.reset()
        if state is not None:
            sums = torch.tensor(state, dtype=torch.float64, device=device)
            self._sums = sums[:_NUM_SUMS]
            self._others = sums[_NUM_SUMS:].view(-1, 2) if len(sums) > _NUM_SUMS else None

    @contextmanager
    def clock(self, name: str, device: torch.device) -> Iterator[None]:
        """Measure the time a block takes, without waiting for the device until the numbers are read."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._clocks.setdefault(name, []).append(time.perf_counter() - start)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._clocks.setdefault(name, []).append((start, end))

    def row_divergences(self) -> dict[int, float]:
        """Mean unclipped divergence of each rollout seen, by its index in the world's batch."""
        return {
            int(index): value
            for rows, values in self._rows
            for index, value in zip(rows.tolist(), values.tolist(), strict=True)
        }

    def seconds(self) -> dict[str, float]:
        """Total time of each clock."""
        return {
            name: sum(t if isinstance(t, float) else _elapsed(*t) for t in times)
            for name, times in self._clocks.items()
        }

    def means(self, reduce, device: torch.device) -> dict[str, float]:
        """Means over all tokens of all ranks.

        Args:
            reduce: sums a tensor over ranks; a collective, so every rank must call.
            device: where an empty sum is made.
        """
        reduced, others = self._reduced(reduce, device)
        means = {name: value / count for name, (count, value) in zip(_OTHERS, others, strict=True) if count}
        total, *sums = reduced[:-3].tolist()
        if not total:
            return means
        means |= {name: value / total for name, value in zip(_MEANS, sums, strict=False)}
        agreement = clip_agreement(reduced[-3:])
        if agreement is not None:
            means["clip_gradient_agreement"] = agreement
        means["entropy_gap"] = means["student_entropy"] - means["target_entropy"]
        buckets = sums[len(_MEANS) :]
        for name, count, value in zip([*BUCKETS, *OUTCOMES], buckets[::2], buckets[1::2], strict=True):
            if count:
                means[f"divergence/{name}"] = value / count
        return means

    def _reduced(self, reduce, device: torch.device) -> tuple[torch.Tensor, list[list[float]]]:
        """The sums over ranks, and tokens and sums of `_OTHERS`; a collective."""
        sums, others = self._sums, self._others
        if sums is None:
            sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=device)
        if others is None:
            others = sums.new_zeros(len(_OTHERS), 2)
        reduced = reduce(torch.cat([sums, others.flatten()]))
        return reduced[:_NUM_SUMS], reduced[_NUM_SUMS:].view(-1, 2).tolist()


def _elapsed(start, end) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000


@torch.no_grad()
def sum_decompositions(
    student: tuple[torch.Tensor, OutputHead],
    teacher: tuple[torch.Tensor, OutputHead],
    reference: tuple[torch.Tensor, OutputHead],
    *,
    temperature: float,
    num_tokens: int | None,
) -> torch.Tensor:
    """Sums over n positions of the fields of `SignalDecomposition`, and n.

    Args:
        student, teacher, reference: hidden states (n, H) of each view and the head that reads them.
        temperature: divides every view's logits, above 0.
        num_tokens: see `losses.decompose_signal`.

    Returns:
        (7,) float64.
    """
    size = len(student[0])
    sums = torch.zeros(len(SignalDecomposition._fields) + 1, dtype=torch.float64, device=student[0].device)
    for start in range(0, size, _TILE_TOKENS):
        logits = (
            head.logits(hidden[start : start + _TILE_TOKENS]).float() / temperature
            for hidden, head in (student, teacher, reference)
        )
        parts = decompose_signal(*logits, num_tokens=num_tokens)
        sums[:-1] += torch.stack([values.double().sum() for values in parts])
    sums[-1] = size
    return sums
