# SPDX-License-Identifier: Apache-2.0
"""Time, memory and error of the loss head, from hidden states to the loss and its gradient.

    python benchmarks/loss_head.py --preset cpu --head frozen trained --repeats 5 --output benchmarks/results/cpu.jsonl

Contenders run in turn within each repeat, so that a busy machine slows all alike:
  floor     the bare products, whose FLOP a second the table prints beside them, because a ratio to a slow machine's products
            flatters: one projection of the student, one per distinct target view, one for the gradient to the
            hidden states and, where the head trains, one for the gradient to the head
  dense     TRL's `generalized_jsd_loss` (GKD) on logits of the whole batch
  chunked   TRL's `ChunkedDivergenceFunction`
  liger     Liger's `LigerFusedLinearJSD`, where it is installed and there is a GPU
  top-100   TRL's `compute_topk_self_distillation_loss` (SDFT) on logits of the whole batch: another loss by design, so
            its errors say how far from the full one
  ours      `trl_opsd.losses.fused_divergence`
  compiled  the same with its elementwise work fused by torch.compile; only where `--backends` names it
"clip" is OPSD's upper clip. Losses of methods stand behind the divergences: `sampled token` is that of POPD (and, in cost, of EGRSD), whose
teacher was projected when it scored. Methods whose advantages go into TRL's loss have no row: that loss is TRL's. "methods / OPSD" divides
times by that of `forward_kl, clip`. The nine contexts of OGLS-SD are one direction when the loss begins. Errors are those of the gradient (largest difference over the largest
entry, of hidden states and head) and of the loss (nats) against float64 from the same inputs, in blocks of positions.
A contender that has no such loss, does not run here or runs out of memory gets a row with a `note`.
`bfloat16` is autocast over float32 tensors, as the trainers run; `pure-bfloat16` holds everything in bfloat16. On a CPU our
products are in float32 even then; `--narrow-products` rounds their inputs as on a GPU, for the errors alone.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import (
    CASES,
    CONTENDERS,
    OURS,
    DoesNotRunError,
    Gradients,
    Inputs,
    backpropagate,
    exact,
    floor,
    floor_flop,
)
from measuring import Sample, emit, is_out_of_memory, limited_memory, machine, measure, summary
from narrow_products import narrow_products

from trl_opsd.losses.projection import product_dtype

# N x H x V. Vocabularies: a round 65,536, Qwen3's 151,936 and Gemma's 262,144.
PRESETS = {
    "small": "512x1024x65536",
    "cpu": "512x1024x65536,512x1024x151936,512x1024x262144,512x4096x65536,2048x1024x65536",
    "gpu": "512x1024x151936,2048x2048x65536,2048x2048x151936,8192x2048x151936,8192x4096x151936,8192x2560x262144",
}
DTYPES = ("float32", "bfloat16", "pure-bfloat16")
OPSD, OGLS_SD = "forward_kl, clip", "ogls_sd"
METHODS = [what for what, case in CASES.items() if case.weight_of or case.loss_of or "opd" in what]


@dataclass
class Trial:
    """One row: what runs, and what came of it."""

    what: str
    backend: str
    head: str
    run: Callable[[], Gradients | None]
    note: str | None = None
    samples: list[Sample] = field(default_factory=list)
    loss_error: float | None = None
    gradient_error: float | None = None

    def attempt(self, device: str) -> Gradients | None:
        """Run once and keep the sample; nothing but a note where that cannot be."""
        if self.note is not None:
            return None
        try:
            sample = measure(self.run, device)
        except DoesNotRunError as reason:
            self.note = f"does not run here: {reason}"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.note = "out of memory"
        else:
            self.samples.append(sample._replace(result=None))
            return sample.result
        if device == "cuda":
            torch.cuda.empty_cache()
        return None

    def warm_up(self, truth: Gradients | None, device: str) -> None:
        """Run once without keeping the sample, and set the errors of what has a loss."""
        found = self.attempt(device)
        self.samples.clear()
        if found is None or truth is None:
            return
        self.loss_error = abs(found.loss - truth.loss)
        pairs = [(found.hidden, truth.hidden), (found.weight, truth.weight)]
        self.gradient_error = max(
            ((grad - true).abs().max() / true.abs().max()).item() for grad, true in pairs if grad is not None
        )


def make_trials(inputs: Inputs, args: argparse.Namespace) -> list[Trial]:
    """All contenders of all cases, the floor first."""
    autocast, trials = args.dtype == "bfloat16", []
    with torch.autocast(inputs.weight.device.type, torch.bfloat16, enabled=autocast):
        bare = inputs.to(product_dtype(inputs.student))
    for head in args.head:
        for what, case in ((what, CASES[what]) for what in args.what):
            trained = head == "trained"
            trials.append(Trial(what, "floor", head, partial(floor, bare, case, trained)))
            for backend in args.backends:
                run = partial(backpropagate, CONTENDERS[backend], inputs, case, trained, autocast)
                trials.append(Trial(what, backend, head, run, None if backend in OURS else case.lack))
    return trials


def exact_if_it_fits(inputs: Inputs, what: str) -> Gradients | None:
    try:
        return exact(inputs, CASES[what])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def benchmark(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one shape "NxHxV"."""
    size, width, vocabulary = map(int, shape.split("x"))
    held = torch.bfloat16 if args.dtype == "pure-bfloat16" else torch.float32
    inputs = Inputs.draw(size, width, vocabulary, args.device, held)
    trials = make_trials(inputs, args)
    for what in args.what:
        truth = exact_if_it_fits(inputs, what) if args.exact else None
        for trial in (trial for trial in trials if trial.what == what):
            trial.warm_up(truth, args.device)
    truth = None
    for _ in range(args.repeats):
        for trial in trials:
            trial.attempt(args.device)
    return [_row(trial, shape, size, args) for trial in trials]


def _row(trial: Trial, shape: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    timing = summary(trial.samples if trial.note is None else [])
    return {
        "what": trial.what,
        "backend": trial.backend,
        "head": trial.head,
        "shape": shape,
        "dtype": args.dtype,
        "products": "narrow" if args.narrow_products else "of the device",
        **machine(args.device),
        **timing,
        "tokens_per_s": timing["median_s"] and round(size / timing["median_s"], 1),
        "loss_error": trial.loss_error,
        "gradient_error": trial.gradient_error,
        "note": trial.note,
    }


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """A Markdown table per shape and head: medians over the floor's, ours against TRL's; then OGLS-SD over OPSD."""
    for shape, head in dict.fromkeys((row["shape"], row["head"]) for row in rows):
        chosen = {(row["what"], row["backend"]): row for row in rows if (row["shape"], row["head"]) == (shape, head)}

        def ratio(above, below, quantity="median_s", chosen=chosen):
            values = [chosen[key][quantity] if key in chosen else None for key in (above, below)]
            return f"{values[0] / values[1]:.2f}" if all(values) else "-"

        backends = [backend for backend in CONTENDERS if any(key[1] == backend for key in chosen)]
        columns = [f"{backend} / floor" for backend in backends]
        columns += ["chunked / ours", "MB ours / chunked", "MB ours / dense"]
        print(f"\n{shape}, {rows[0]['dtype']}, head {head}\n\n| | floor s | floor GFLOP/s | {' | '.join(columns)} |")
        print("|" + "---|" * (3 + len(columns)))
        for what in dict.fromkeys(what for what, _ in chosen):
            seconds = chosen[what, "floor"]["median_s"]
            cells = [what, "-" if seconds is None else f"{seconds:.4g}", _floor_speed(what, head, shape, seconds)]
            cells += [ratio((what, backend), (what, "floor")) for backend in backends]
            cells += [ratio((what, "chunked"), (what, "ours"))]
            cells += [ratio((what, "ours"), (what, other), "peak_extra_mb") for other in ("chunked", "dense")]
            print("| " + " | ".join(cells) + " |")
        opsd = (OPSD, "ours")
        print(f"\nOGLS-SD / OPSD: {ratio((OGLS_SD, 'ours'), opsd)}; ", end="")
        shares = [f"{what} {ratio((what, 'ours'), opsd)}" for what in METHODS if (what, "ours") in chosen]
        print("methods / OPSD:", ", ".join(shares) or "-")


def _floor_speed(what: str, head: str, shape: str, seconds: float | None) -> str:
    """GFLOP/s that the machine's bare products reach."""
    flop = floor_flop(CASES[what], head == "trained", *map(int, shape.split("x")))
    return f"{flop / seconds / 1e9:.3g}" if seconds else "-"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="N x H x V, comma separated, instead of a preset's")
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--what", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    standard = [backend for backend in CONTENDERS if backend != "compiled"]
    parser.add_argument("--backends", nargs="+", default=standard, choices=list(CONTENDERS), help="beside the floor")
    parser.add_argument("--head", nargs="+", default=["frozen"], choices=["frozen", "trained"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="errors against float64")
    parser.add_argument("--narrow-products", action="store_true", help="errors of a GPU's products on a CPU; no times")
    parser.add_argument("--output", type=Path, help="file that the JSON lines are appended to")
    args = parser.parse_args(arguments)
    rows = []
    with limited_memory(args.device), narrow_products() if args.narrow_products else nullcontext():
        for shape in (args.shapes or PRESETS[args.preset]).split(","):
            new = benchmark(shape, args)
            emit(new, args.output)
            rows += new
    print_ratios(rows)


if __name__ == "__main__":
    main()
