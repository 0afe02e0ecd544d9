# SPDX-License-Identifier: Apache-2.0
"""Micro-batches with as little padding as there can be: rows of an optimizer step by length, each cut to its longest.

TRL pads a generation batch to its longest prompt and rollout, shuffles it and splits it. A loss that is divided by the counts of
the whole optimizer step is the same for every grouping of the step's rows, so rows of about one length may stand together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

# Which tokens a column counts, and in which dimension.
_TOKENS = {
    **dict.fromkeys(("prompt_ids", "prompt_mask"), ("prompt", 1)),
    **dict.fromkeys(
        (
            "advantages",
            "completion_ids",
            "completion_mask",
            "importance_sampling_ratio",
            "old_per_token_logps",
            "ref_per_token_logps",
            "sampling_per_token_logps",
            "tool_mask",
        ),
        ("rollout", 1),
    ),
    **dict.fromkeys(("anchor_hidden", "direction_hidden", "distillation_mask", "rollout_mark"), ("distilled", 1)),
    **dict.fromkeys(("view_entropies", "view_log_probs"), ("distilled", 2)),
    **dict.fromkeys(("extra_ids", "extra_mask"), ("extra", 1)),
    **dict.fromkeys(("extra_view_entropies", "extra_view_log_probs"), ("extra", 2)),
}
_WITHOUT_TOKENS = ("extra_view_weights", "view_weights")
_MASKS = ("prompt_mask", "completion_mask", "distillation_mask", "extra_mask")

Batch = Mapping[str, Any]


class Lengths(NamedTuple):
    """Tokens of a row, or the width of a micro-batch.

    Attributes:
        prompt: from its first token to its end.
        rollout: up to the last token that is not masked.
        distilled: up to the last token that is.
        extra: of the second sequence; 0 without.
    """

    prompt: int
    rollout: int
    distilled: int
    extra: int

    def read(self, whole: bool) -> int:
        """Positions that the student computes for each sequence; of the whole rollout or of what is distilled."""
        return self.prompt + max(self.rollout if whole else self.distilled, self.extra, 1)


def by_length(
    batches: Sequence[Batch], *, regroups: bool, reads_whole: bool, multiple: int = 1
) -> list[dict[str, Any]]:
    """The micro-batches of an optimizer step with less padding.

    Args:
        batches: equally many rows each, with the columns of TRL and of `TargetMaker.columns`; of one generation batch. A column
            that is not known here keeps them as they are.
        regroups: rows may change places; where the loss of a row depends on the others of its micro-batch they may not.
        reads_whole: the student reads rollouts to their end, and not only what is distilled of them.
        multiple: of the widths, as far as the batches' own widths go.

    Returns:
        As many of as many rows, the longest first where rows changed places.
    """
    if not all(_is_known(name, column) for name, column in batches[0].items()):
        return [dict(batch) for batch in batches]
    lengths = [own for batch in batches for own in row_lengths(batch)]
    size = len(lengths) // len(batches)
    groups = _split(range(len(lengths)), size)
    if regroups:
        groups = cheapest_groups(lengths, size, reads_whole)
    return [_take(batches, rows, _widths([lengths[row] for row in rows], multiple)) for rows in groups]


def row_lengths(batch: Batch) -> list[Lengths]:
    """Of each row of a batch; waits for the device."""
    sizes = []
    for name in _MASKS:
        mask = batch.get(name)
        if mask is None:
            mask = torch.zeros_like(batch["prompt_mask"])
        elif name == "prompt_mask":  # padded on the left
            mask = mask.flip(1)
        used = torch.nn.functional.pad(mask != 0, (1, 0))
        sizes.append((used * torch.arange(used.size(1), device=mask.device)).amax(1))
    return [Lengths(*own) for own in torch.stack(sizes, 1).tolist()]


def cheapest_groups(lengths: Sequence[Lengths], size: int, reads_whole: bool) -> list[list[int]]:
    """Rows in groups of `size`, such that few positions are computed; as they come where no order is better."""

    def cost(groups: list[list[int]]) -> int:
        return sum(_widths([lengths[row] for row in rows]).read(reads_whole) for rows in groups)

    def own(row: int) -> int:
        return lengths[row].read(reads_whole)

    rows = range(len(lengths))
    orders = [rows, *(sorted(rows, key=key, reverse=True) for key in (own, lambda row: own(row) - lengths[row].prompt))]
    return min((_split(order, size) for order in orders), key=cost)


def _split(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _widths(lengths: Sequence[Lengths], multiple: int = 1) -> Lengths:
    """Of the longest of each, at least one token; an empty tensor has no place in a forward."""
    return Lengths(*(-(-max(1, *own) // multiple) * multiple for own in zip(*lengths, strict=True)))


def _is_known(name: str, column: Any) -> bool:
    """Whether a column's rows can be taken and cut: of another one of several dimensions it is not known what they count."""
    if column is None or name in _TOKENS or name in _WITHOUT_TOKENS:
        return True
    return isinstance(column, torch.Tensor) and column.ndim < 2


def _take(batches: Sequence[Batch], rows: Sequence[int], widths: Lengths) -> dict[str, Any]:
    """A micro-batch of some rows, counted over the batches, with its columns as wide as `widths`."""
    size, taken = len(batches[0]["prompt_ids"]), {}
    for name, column in batches[0].items():
        if column is not None and column.ndim:
            column = torch.stack([_cut(name, batches[row // size][name][row % size], widths) for row in rows])
        taken[name] = column
    return taken


def _cut(name: str, row: torch.Tensor, widths: Lengths) -> torch.Tensor:
    part, dimension = _TOKENS.get(name, ("", 0))
    if not 0 < dimension <= row.ndim:
        return row
    length = row.size(dimension - 1)
    width = min(length, getattr(widths, part))
    return row.narrow(dimension - 1, length - width if part == "prompt" else 0, width)
