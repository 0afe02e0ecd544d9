# SPDX-License-Identifier: Apache-2.0
"""Micro-batches with as little padding as there can be: rows of an optimizer step by length, each cut to its longest.

TRL pads a generation batch to its longest prompt and rollout, shuffles it and splits it. A loss that is divided by the counts of
the whole optimizer step is the same for every grouping of the step's rows, so rows of about one length may stand together.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

_PROMPT = ("prompt_ids", "prompt_mask")
# Which tokens a column counts, and in which dimension.
_TOKENS = {
    **dict.fromkeys(_PROMPT, ("prompt", 1)),
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
    **dict.fromkeys(("extra_anchor_hidden", "extra_ids", "extra_mask"), ("extra", 1)),
    **dict.fromkeys(("extra_view_entropies", "extra_view_log_probs"), ("extra", 2)),
}
_WITHOUT_TOKENS = ("extra_view_weights", "view_weights")
# Share of the slowest rank's positions above which rows change ranks.
WORTH_MOVING = 0.05
_MASKS = ("prompt_mask", "completion_mask", "distillation_mask", "extra_mask")

Batch = Mapping[str, Any]
Row = dict[str, torch.Tensor]


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
    batches: Sequence[Batch], *, regroups: bool, reads_whole: bool, multiple: int = 1, accelerator: Any = None
) -> list[dict[str, Any]]:
    """The micro-batches of an optimizer step with less padding; a collective where rows may change ranks.

    Args:
        batches: equally many rows each, with the columns of TRL and of `TargetMaker.columns`; of one generation batch. A column
            that is not known here keeps them as they are.
        regroups: rows may change places; where the loss of a row depends on the others of its micro-batch they may not.
        reads_whole: the student reads rollouts to their end, and not only what is distilled of them.
        multiple: of the widths, as far as the columns go.
        accelerator: of the trainer, where rows may change ranks too; each rank has as many.

    Returns:
        As many of as many rows, the longest first where rows changed places.
    """
    if not all(_is_known(name, column) for name, column in batches[0].items()):
        return [dict(batch) for batch in batches]
    shared = {name: column for name, column in batches[0].items() if column is None or not column.ndim}
    lengths = [own for batch in batches for own in row_lengths(batch)]
    names = [name for name in batches[0] if name not in shared]
    rows = dict(enumerate(row for batch in batches for row in _rows_of(batch, names)))
    size = len(rows) // len(batches)
    if regroups and accelerator is not None and accelerator.num_processes > 1:
        lengths, groups = groups_over_ranks(lengths, size, reads_whole, accelerator)
        rows = _exchanged(rows, lengths, groups, multiple, accelerator)
        groups = groups[accelerator.process_index]
    else:
        groups = cheapest_groups(lengths, size, reads_whole) if regroups else _split(range(len(lengths)), size)
    joined = [_join([rows[row] for row in own], _widths([lengths[row] for row in own], multiple)) for own in groups]
    return [{name: shared.get(name, own.get(name)) for name in batches[0]} for own in joined]


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


def groups_over_ranks(
    lengths: Sequence[Lengths], size: int, reads_whole: bool, accelerator: Any
) -> tuple[list[Lengths], list[list[list[int]]]]:
    """Lengths of all ranks' rows from those of this one, and each rank's groups of them; a collective."""
    own = torch.tensor([*lengths], device=accelerator.device)
    everyone = [Lengths(*row) for row in accelerator.gather(own).tolist()]
    return everyone, shares_of_ranks(everyone, accelerator.num_processes, size, reads_whole)


def shares_of_ranks(lengths: Sequence[Lengths], num_ranks: int, size: int, reads_whole: bool) -> list[list[list[int]]]:
    """The groups of each rank, of rows counted over all ranks.

    Rows change ranks where the rank with the most positions then has `WORTH_MOVING` fewer of them; the longest groups are dealt
    out first, to and fro, so that ranks have about equal work in each forward and in all.
    """
    count = len(lengths) // num_ranks
    kept = [
        [[first + row for row in group] for group in cheapest_groups(lengths[first : first + count], size, reads_whole)]
        for first in range(0, len(lengths), count)
    ]

    def cost(group: list[int]) -> int:
        return _widths([lengths[row] for row in group]).read(reads_whole)

    def slowest(shares: list[list[list[int]]]) -> int:
        return max(sum(map(cost, share)) for share in shares)

    groups = sorted(cheapest_groups(lengths, size, reads_whole), key=cost, reverse=True)
    rounds = [groups[start : start + num_ranks] for start in range(0, len(groups), num_ranks)]
    dealt = [list(share) for share in zip(*(own[:: (-1) ** place] for place, own in enumerate(rounds)), strict=True)]
    return dealt if slowest(dealt) <= (1 - WORTH_MOVING) * slowest(kept) else kept


def _exchanged(
    rows: Mapping[int, Row],
    lengths: Sequence[Lengths],
    groups: Sequence[Sequence[Sequence[int]]],
    multiple: int,
    accelerator: Any,
) -> dict[int, Row]:
    """This rank's rows, counted over all ranks, and those that its groups take from others; a collective if there are some."""
    rank, count = accelerator.process_index, len(rows)
    rows = {rank * count + place: row for place, row in rows.items()}
    wanted = [sorted(row for row in chain.from_iterable(share)) for share in groups]
    if all(row // count == owner for owner, share in enumerate(wanted) for row in share):
        return rows
    sent = [
        {row: _cut_row(rows[row], _widths([lengths[row]], multiple)) for row in share if row in rows and other != rank}
        for other, share in enumerate(wanted)
    ]
    received = _all_to_all(sent, accelerator)
    devices = {name: column.device for name, column in next(iter(rows.values())).items()}
    return rows | {row: {name: own[name].to(devices[name]) for name in own} for row, own in received.items()}


def _all_to_all(sent: Sequence[Mapping[int, Row]], accelerator: Any) -> dict[int, Row]:
    """Rows that other ranks send to this one, from what it sends to each, on the accelerator's device; a collective."""
    kinds = [
        {row: {name: (column.shape, column.dtype) for name, column in own.items()} for row, own in part.items()}
        for part in sent
    ]
    kinds = [own[accelerator.process_index] for own in gather_object([kinds])]
    given = [_bytes(part, accelerator.device) for part in sent]
    sizes = [sum(_size(*kind) for own in part.values() for kind in own.values()) for part in kinds]
    taken = given[0].new_empty(sum(sizes))
    torch.distributed.all_to_all_single(taken, torch.cat(given), sizes, [len(part) for part in given])
    received: dict[int, Row] = {}
    start = 0
    for row, own in chain.from_iterable(part.items() for part in kinds):
        received[row] = {}
        for name, (shape, dtype) in own.items():
            end = start + _size(shape, dtype)
            received[row][name], start = taken[start:end].clone().view(dtype).view(shape), end  # a copy is aligned
    return received


def _size(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


def _bytes(rows: Mapping[int, Row], device: torch.device) -> torch.Tensor:
    """The columns of rows one behind the other, (n,) uint8."""
    columns = [column.to(device).contiguous() for row in rows.values() for column in row.values()]
    parts = [column.view(-1).view(torch.uint8) for column in columns]
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts])


def _cut_row(row: Row, widths: Lengths) -> Row:
    return {name: _cut(name, column, widths) for name, column in row.items()}


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


def _rows_of(batch: Batch, names: Sequence[str]) -> list[Row]:
    """Views of a batch's rows."""
    return [dict(zip(names, row, strict=True)) for row in zip(*(batch[name] for name in names), strict=True)]


def _join(rows: Sequence[Row], widths: Lengths) -> dict[str, torch.Tensor]:
    """A micro-batch of some rows, their columns as wide as `widths` where a row is as long."""
    batch = {}
    for name in rows[0]:
        columns = [_cut(name, row[name], widths) for row in rows]
        sizes = [max(own) for own in zip(*(column.shape for column in columns), strict=True)]
        batch[name] = torch.stack([_padded(name, column, sizes) for column in columns])
    return batch


def _cut(name: str, row: torch.Tensor, widths: Lengths) -> torch.Tensor:
    part, dimension = _TOKENS.get(name, ("", 0))
    if not 0 < dimension <= row.ndim:
        return row
    length = row.size(dimension - 1)
    width = min(length, getattr(widths, part))
    return row.narrow(dimension - 1, length - width if part == "prompt" else 0, width)


def _padded(name: str, row: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Zeros beside what another rank's row has more of: in front of a prompt, behind everything else."""
    missing = [size - own for size, own in zip(sizes, row.shape, strict=True)]
    if not any(missing):
        return row
    sides = [side for own in reversed(missing) for side in ((own, 0) if name in _PROMPT else (0, own))]
    return torch.nn.functional.pad(row, sides)
