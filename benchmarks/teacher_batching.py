# SPDX-License-Identifier: Apache-2.0
"""Time and tokens of teacher forwards over rows of unequal length, none of which share a context: three ways to batch.

    python benchmarks/teacher_batching.py --rows 24 --shortest 128 --longest 1024 --span 64 --repeats 3

  padded    rows as they come, as many a forward as the budget holds at their longest
  sorted    longest first, as `trl_opsd.teacher.scoring` does
  packed    rows one behind another in one sequence, positions restarting, a block mask between them (by transformers)
All within `--budget` tokens a forward, in turn within each repeat. One JSON line a way, then ratios to padded.
`difference` is the largest of the scored hidden states to padded's, relative to their largest. Packing computes no padding,
but where attention cannot skip blocks (sdpa with a mask) it pays for the square of the packed length.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from measuring import emit, machine, measure, summary
from teacher_scoring import CountedForward, make_model, run_scoring

from trl_opsd.teacher.jobs import ScoringJob
from trl_opsd.teacher.prompts import left_pad, positions_from_mask

Rows = Sequence[tuple[list[int], list[int]]]  # context and rollout of each


def draw_rows(args: argparse.Namespace) -> Rows:
    """Contexts of lengths spread evenly over the logarithm, in a random order, and rollouts of one length."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0, 1, args.rows)[torch.randperm(args.rows, generator=generator)]
    lengths = (args.shortest * (args.longest / args.shortest) ** spread).round().int().tolist()

    def draw(length):
        return torch.randint(512, (length,), generator=generator).tolist()

    return [(draw(length), draw(args.span)) for length in lengths]


@torch.no_grad()
def padded(model, rows: Rows, args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    states, computed, start = [], 0, 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * max(map(_length, rows[start : stop + 1])) <= args.budget:
            stop += 1
        ids, mask = left_pad([context + rollout for context, rollout in rows[start:stop]], 0)
        ids, mask = ids.to(args.device), mask.to(args.device)
        output = model.model(ids, attention_mask=mask, position_ids=positions_from_mask(mask), use_cache=False)
        states.append(output.last_hidden_state[:, -args.span - 1 : -1])
        computed, start = computed + ids.numel(), stop
    return torch.cat(states), computed


@torch.no_grad()
def packed(model, rows: Rows, args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    states, batch = [], []
    for row in [*rows, None]:
        if batch and (row is None or sum(map(_length, [*batch, row])) > args.budget):
            ids = [token for context, rollout in batch for token in context + rollout]
            places = [place for entry in batch for place in range(_length(entry))]
            columns = {"input_ids": ids, "position_ids": places}
            columns = {name: torch.tensor([values], device=args.device) for name, values in columns.items()}
            output = model.model(**columns, use_cache=False).last_hidden_state[0]
            ends = torch.tensor([_length(entry) for entry in batch]).cumsum(0).tolist()
            states += [output[end - args.span - 1 : end - 1] for end in ends]
            batch = []
        batch.append(row)
    return torch.stack(states), sum(map(_length, rows))


def sorted_by_length(model, rows: Rows, args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    jobs = [ScoringJob(context, rollout, index, 1.0, 0.0) for index, (context, rollout) in enumerate(rows)]
    teacher = CountedForward(model, model)
    target = run_scoring(teacher, jobs, args, with_direction=False)
    return target.anchor, teacher.num_tokens


def _length(row: tuple[list[int], list[int]]) -> int:
    return len(row[0]) + len(row[1])


WAYS: dict[str, Callable] = {"padded": padded, "sorted": sorted_by_length, "packed": packed}


def main() -> None:
    """Measure the ways in turn and print their rows and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--shortest", type=int, default=128, help="tokens of the shortest context")
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--span", type=int, default=64, help="scored tokens of each rollout")
    parser.add_argument("--budget", type=int, default=8192, help="tokens a forward, padding included")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, rows = make_model(args), draw_rows(args)
    samples = {way: [] for way in WAYS}
    for _ in range(args.repeats + 1):
        for way, run in WAYS.items():
            samples[way].append(measure(partial(run, model, rows, args), args.device))
    plain = samples["padded"][-1].result[0]
    lines = []
    for way, measured in samples.items():
        states, computed = measured[-1].result
        numbers = {"tokens_computed": computed, "tokens": sum(map(_length, rows))}
        difference = ((states - plain).abs().max() / plain.abs().max()).item()
        lines.append({"way": way, **machine(args.device), **summary(measured[1:]), **numbers, "difference": difference})
    emit(lines, None)
    print("\n| way | tokens computed | / padded | s | padded / | peak MB | difference |\n|---|---|---|---|---|---|---|")
    base = lines[0]
    for line in lines:
        tokens, ratio = line["tokens_computed"], line["tokens_computed"] / base["tokens_computed"]
        speed = base["median_s"] / line["median_s"]
        print(f"| {line['way']} | {tokens:,} | {ratio:.2f} | {line['median_s']:.3f} | {speed:.2f} |", end="")
        print(f" {line['peak_extra_mb']:.0f} | {line['difference']:.1e} |")


if __name__ == "__main__":
    main()
