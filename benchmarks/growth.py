# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow: the loss head with vocabulary and span, the teacher's scoring with what it reads.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --picture docs/growth.png

  vocabulary  loss head (forward KL, head frozen): ours and TRL's `ChunkedDivergenceFunction`
  positions   the same
  rollouts    scoring, one context that a group's rollouts share (OPSD)
  contexts    scoring, a growing pool of contexts on each of a few rollouts (OGLS-SD)
  context     scoring, tokens of the one context
  span        scoring, scored tokens of each rollout
Contexts are read once for all their rollouts. All points of a curve run in turn within each repeat. One JSON line a
point, then the exponents: the slope of a line through log time (or memory) over log size, on the upper half of the
sizes. 1 is linear. Attention makes time grow faster than that with context and span: its part is quadratic, small at
first, and rules in the end. Memory is the peak above what was held before; ours stops growing with the span where a
tile is full, since what is left is two tiles and the gradient.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from contenders import CASES, Inputs, backpropagate, chunked, ours
from measuring import Sample, emit, machine, measure, summary
from teacher_scoring import make_jobs, make_model, score

# First and last size, doubling in between; of one thread on a CPU in a few minutes.
SIZES = {
    "vocabulary": (4096, 131_072),
    "positions": (64, 2048),
    "rollouts": (1, 32),
    "contexts": (1, 32),
    "context": (128, 4096),
    "span": (32, 1024),
}
TITLES = {
    "vocabulary": "loss head: vocabulary",
    "positions": "loss head: positions",
    "rollouts": "scoring: rollouts sharing a context",
    "contexts": "scoring: contexts of each rollout",
    "context": "scoring: tokens of the context",
    "span": "scoring: scored tokens of each rollout",
}
QUANTITIES = {"median_s": "time", "peak_extra_mb": "memory"}
# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = {"ours": "#0072B2", "TRL chunked": "#D55E00", "scoring": "#009E73"}
LINES = {"median_s": "-o", "peak_extra_mb": "--s"}


class Point(NamedTuple):
    """One size of one curve, and what runs there."""

    over: str
    curve: str
    size: int
    run: Callable[[], Sample]


def loss_points(over: str, sizes: list[int], args: argparse.Namespace) -> list[Point]:
    """The loss head at several vocabularies or numbers of positions, on slices of one draw."""
    fixed = {"vocabulary": args.vocabulary, "positions": args.positions}
    points = []
    largest = fixed | {over: max(sizes)}
    drawn = Inputs.draw(largest["positions"], args.width, largest["vocabulary"], args.device, torch.float32)
    for size in sizes:
        shape = fixed | {over: size}
        inputs = drawn.at(slice(shape["positions"]))._replace(weight=drawn.weight[: shape["vocabulary"]])
        for curve, contender in (("ours", ours), ("TRL chunked", chunked)):
            run = partial(backpropagate, contender, inputs, CASES["forward_kl"], trained=False, autocast=False)
            points.append(Point(over, curve, size, partial(measure, run, args.device)))
    return points


def scoring_points(over: str, sizes: list[int], model, args: argparse.Namespace) -> list[Point]:
    """The teacher's scoring, shared contexts read once."""
    points = []
    for size in sizes:
        fixed = {"rollouts": args.rollouts, "contexts": 1, "context": args.context, "span": args.span}
        shape = fixed | {over: size}
        scored = argparse.Namespace(**vars(args) | {"span": shape["span"]})
        jobs = make_jobs(shape["rollouts"], shape["contexts"], False, shape["context"], scored)
        points.append(Point(over, "scoring", size, partial(_score, model, jobs, scored)))
    return points


def _score(model, jobs, args: argparse.Namespace) -> Sample:
    return score(model, jobs, True, args)[0]


def benchmark(points: list[Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each point; a first repeat is not counted."""
    samples = [[] for _ in points]
    for _ in range(args.repeats + 1):
        for point, measured in zip(points, samples, strict=True):
            measured.append(point.run()._replace(result=None))
    return [
        {
            "over": point.over,
            "curve": point.curve,
            "size": point.size,
            **machine(args.device),
            **summary(measured[1:]),
        }
        for point, measured in zip(points, samples, strict=True)
    ]


def curves(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (over, curve), in the order measured."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["over"], row["curve"]), []).append(row)
    return found


def exponent(rows: list[dict[str, Any]], quantity: str) -> float | None:
    """Slope of log quantity over log size on the upper half of the sizes; None where it was not measured there."""
    middle = sqrt(rows[0]["size"] * rows[-1]["size"])
    upper = [(row["size"], row[quantity]) for row in rows if row["size"] >= middle and row[quantity]]
    if len(upper) < 2:
        return None
    slope, _ = np.polyfit(*np.log(upper).T, 1)
    return float(slope)


def print_exponents(rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    print("\n| over | sizes | curve | time exponent | memory exponent |\n|---|---|---|---|---|")
    for (over, curve), points in curves(rows).items():
        slopes = [_rounded(exponent(points, quantity)) for quantity in QUANTITIES]
        print(f"| {over} | {points[0]['size']:,} to {points[-1]['size']:,} | {curve} | {' | '.join(slopes)} |")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over their values at the smallest size, a panel for each thing that grows."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row["over"] for row in rows))
    num_columns = min(3, len(panels))
    num_rows = ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 3.6 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axes, over in zip(grid, panels, strict=False):
        for (other, curve), points in curves(rows).items():
            if other != over:
                continue
            sizes = [point["size"] for point in points]
            for quantity, line in LINES.items():
                values = [point[quantity] or np.nan for point in points]
                label = f"{curve}, {QUANTITIES[quantity]}: {_rounded(exponent(points, quantity))}"
                relative = np.divide(values, values[0])
                axes.plot(sizes, relative, line, color=COLORS[curve], ms=4, label=label)
        axes.plot(sizes, np.divide(sizes, sizes[0]), ":", color="#000000", lw=1, label="linear: 1")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=TITLES[over], ylabel="over the smallest size's")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rounded(slope: float | None) -> str:
    return "-" if slope is None else f"{slope:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--over", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--doublings", type=int, help="from the first size, instead of up to the last")
    loss = parser.add_argument_group("loss head, where it does not grow")
    loss.add_argument("--vocabulary", type=int, default=32_768)
    loss.add_argument("--positions", type=int, default=128)
    loss.add_argument("--width", type=int, default=256, help="hidden size")
    scoring = parser.add_argument_group("scoring, where it does not grow")
    scoring.add_argument("--rollouts", type=int, default=4)
    scoring.add_argument("--context", type=int, default=256, help="tokens")
    scoring.add_argument("--span", type=int, default=64, help="scored tokens of each rollout")
    scoring.add_argument("--layers", type=int, default=2)
    scoring.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    scoring.add_argument("--budget", type=int, default=32_768, help="teacher_tokens_per_forward")
    scoring.add_argument("--dtype", default="float32", help="of the teacher")
    scoring.add_argument("--attention", default="sdpa")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="file that the JSON lines are appended to")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(arguments)
    model, rows = make_model(args), []
    for over in args.over:
        first, last = SIZES[over]
        last = last if args.doublings is None else first << args.doublings
        sizes = [first << step for step in range(int(last / first).bit_length())]
        is_loss = over in ("vocabulary", "positions")
        points = loss_points(over, sizes, args) if is_loss else scoring_points(over, sizes, model, args)
        new = benchmark(points, args)
        emit(new, args.output)
        rows += new
    print_exponents(rows)
    if args.picture is not None:
        plot(rows, args.picture)


if __name__ == "__main__":
    main()
