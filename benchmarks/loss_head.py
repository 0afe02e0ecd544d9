# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the loss head, from hidden states to the loss and its gradient: head frozen, float32.

    python benchmarks/loss_head.py --shapes "512x1024x65536,512x1024x151936" --repeats 5

Contenders run in turn within each repeat, so that a busy machine slows all alike:
  floor     the bare products: one projection per view and one for the gradient to the hidden states
  dense     TRL's `generalized_jsd_loss` on logits of the whole batch
  chunked   TRL's `ChunkedDivergenceFunction`
  fused     `trl_opsd.losses.fused_divergence`
One JSON line per row, then a table of ratios to the floor. Memory is the peak above what was held before.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_opsd.losses import (
    BoundedShape,
    Divergence,
    LinearShape,
    Shape,
    dense_divergence_from_hidden,
    fused_divergence,
)

TEMPERATURE = 1.1


class Case(NamedTuple):
    """One kind of target: TRL's number for its divergence (None where TRL has no such target), and ours."""

    trl_beta: float | None
    divergence: Divergence
    shape: Shape
    num_target_products: int


CASES = {
    "forward_kl": Case(0.0, Divergence("forward_kl", temperature=TEMPERATURE), Shape(), 1),
    "jsd": Case(0.5, Divergence("jsd", temperature=TEMPERATURE), Shape(), 1),
    "opsd (upper clip)": Case(None, Divergence("forward_kl", 0.5, TEMPERATURE, "upper"), Shape(), 1),
    "ogls_sd": Case(None, Divergence("forward_kl", 0.5, TEMPERATURE, "symmetric"), LinearShape(3.0), 1),
    "purified": Case(None, Divergence("jsd", temperature=TEMPERATURE), BoundedShape(), 2),
}


class Inputs(NamedTuple):
    """Hidden states of the student and of the frozen views, each (N, H), and the head (V, H)."""

    student: torch.Tensor
    anchor: torch.Tensor
    direction: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def draw(cls, size: int, width: int, vocabulary: int, device: str) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        student = normal(size, width)
        anchor, direction = student + 0.5 * normal(size, width), 0.3 * normal(size, width)
        return cls(student, anchor, direction, normal(vocabulary, width) * 3 / width**0.5)


def floor(inputs: Inputs, case: Case) -> float:
    tile = torch.empty(256, len(inputs.weight), device=inputs.weight.device)
    grad = torch.empty_like(inputs.student)
    for start in range(0, len(grad), len(tile)):
        rows = slice(start, start + len(tile))
        out = tile[: len(grad[rows])]
        for hidden in (inputs.anchor, inputs.direction)[: case.num_target_products]:
            torch.mm(hidden[rows], inputs.weight.T, out=out)
        torch.mm(inputs.student[rows], inputs.weight.T, out=out)
        torch.mm(out, inputs.weight, out=grad[rows])
    return float("nan")


def dense(inputs: Inputs, case: Case) -> float:
    student = inputs.student.detach().requires_grad_()
    with torch.no_grad():
        target_logits = inputs.anchor @ inputs.weight.T
    loss = GKDTrainer.generalized_jsd_loss(
        student @ inputs.weight.T,
        target_logits,
        beta=case.trl_beta,
        temperature=TEMPERATURE,
        num_items_in_batch=len(student),
    )
    loss.backward()
    return loss.item()


def chunked(inputs: Inputs, case: Case) -> float:
    student = inputs.student.detach().requires_grad_()
    per_token, _ = ChunkedDivergenceFunction.apply(
        student, inputs.weight, None, inputs.anchor, inputs.weight, None, case.trl_beta, TEMPERATURE
    )
    loss = per_token.mean()
    loss.backward()
    return loss.item()


def fused(inputs: Inputs, case: Case) -> float:
    student = inputs.student.detach().requires_grad_()
    loss, _ = fused_divergence(*_arguments(inputs._replace(student=student), case), **_settings(inputs, case))
    loss.backward()
    return loss.item()


def exact(inputs: Inputs, case: Case, rows_at_a_time: int = 64) -> float:
    """Loss in float64, by the plain form, a few rows at a time."""
    wide = Inputs(*(tensor.double() for tensor in inputs))
    total = 0.0
    for start in range(0, len(wide.student), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        part = Inputs(wide.student[rows], wide.anchor[rows], wide.direction[rows], wide.weight)
        loss, _ = dense_divergence_from_hidden(*_arguments(part, case), **_settings(part, case))
        total += loss.item() * len(part.student)
    return total / len(wide.student)


def _arguments(inputs: Inputs, case: Case) -> tuple:
    direction = inputs.direction if case.shape.uses_direction else None
    return inputs.student, inputs.weight, inputs.anchor, direction


def _settings(inputs: Inputs, case: Case) -> dict:
    size = len(inputs.student)
    weights = torch.full((size,), 1 / size, device=inputs.student.device)
    return {"token_weights": weights, "divergence": case.divergence, "shape": case.shape}


def measure(run: Callable[[], float], device: str) -> tuple[float, float, float]:
    """Loss, seconds, and peak bytes above what was held before (NaN where the system does not tell)."""
    before = _reset_peak(device)
    start = time.perf_counter()
    loss = run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return loss, seconds, _peak(device) - before


def _reset_peak(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present resident size
        except OSError:
            return float("nan")
    return _peak(device)


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), float("nan"))


def benchmark(shape: str, device: str, repeats: int) -> list[dict]:
    """Rows of one shape "NxHxV", measured in turn."""
    inputs = Inputs.draw(*map(int, shape.split("x")), device)
    runs = {}
    for what, case in CASES.items():
        for contender in (floor, dense, chunked, fused):
            if case.trl_beta is not None or contender in (floor, fused):
                runs[what, contender.__name__] = partial(contender, inputs, case)
    measured = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            measured[key].append(measure(run, device))
    truth = {what: exact(inputs, case) for what, case in CASES.items()}
    return [_row(shape, device, *key, samples[1:], truth[key[0]]) for key, samples in measured.items()]


def _row(shape: str, device: str, what: str, backend: str, samples: list[tuple], truth: float) -> dict:
    losses, seconds, peaks = zip(*samples, strict=True)
    return {
        "what": what,
        "backend": backend,
        "shape": shape,
        "device": device,
        "threads": torch.get_num_threads(),
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "peak_extra_mb": round(max(peaks) / 2**20, 1),
        "loss_error": None if backend == "floor" else max(abs(loss - truth) for loss in losses),
    }


def print_table(rows: list[dict]) -> None:
    """Median and fastest seconds, the ratio of each to that of the floor, and memory, one line per row."""
    floors = {(row["shape"], row["what"]): row for row in rows if row["backend"] == "floor"}
    print(f"\n{'shape':18} {'what':18} {'backend':8} {'median s':>9} {'/ floor':>8}", end="")
    print(f" {'fastest s':>9} {'/ floor':>8} {'MB':>6} {'error':>8}")
    for row in rows:
        base = floors[row["shape"], row["what"]]
        error = "" if row["loss_error"] is None else f"{row['loss_error']:.1e}"
        print(f"{row['shape']:18} {row['what']:18} {row['backend']:8}", end="")
        for field in ("median_s", "min_s"):
            print(f" {row[field]:9.3f} {row[field] / base[field]:8.2f}", end="")
        print(f" {row['peak_extra_mb']:6.0f} {error:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="512x1024x65536,512x1024x151936", help="N x H x V, comma separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes.split(","):
        new = benchmark(shape, args.device, args.repeats)
        print(*map(json.dumps, new), sep="\n", flush=True)
        rows += new
    print_table(rows)


if __name__ == "__main__":
    main()
