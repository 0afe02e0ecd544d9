# SPDX-License-Identifier: Apache-2.0
"""d-OPSD on a tiny masked-diffusion model of written-out arithmetic, which is made here: accuracy before and after.

    python benchmarks/diffusion.py --base outputs/masked   # makes the base there if the folder is missing

Rates are chosen on validation problems (`--split validation`), results are of test problems. One line a run, and a table.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from measuring import emit, machine
from transformers import AutoModelForMaskedLM, AutoTokenizer

from trl_opsd.demo import masked
from trl_opsd.demo.task import build_rows
from trl_opsd.evaluation.measures import bootstrap_interval, paired_difference
from trl_opsd.experimental.diffusion.accuracy import measure_accuracy
from trl_opsd.experimental.diffusion.trainer import DiffusionOPSDConfig, DiffusionOPSDTrainer

LENGTHS = {
    "max_prompt_length": 32,
    "max_completion_length": masked.COMPLETION_LENGTH,
    "block_length": 8,
    "diffusion_steps": 12,
}
LOGGED = ("divergence", "clipped_share", "samples/first_right", "samples/right", "samples/drawn")


def rows_of(split: str, count: int) -> list[dict]:
    """Problems of two operations, the same for every run."""
    return build_rows(split, count, num_operations=masked.NUM_OPERATIONS)


def accuracies(model, tokenizer, args, options) -> dict[str, list[float]]:
    """Accuracy of each question with the likeliest tokens, and of four answers at the training's temperature."""
    rows = rows_of(options.split, options.problems)
    return {
        "greedy": measure_accuracy(model, tokenizer, rows, args),
        "sampled": measure_accuracy(model, tokenizer, rows, args, num_samples=4, temperature=args.temperature),
    }


def run(options, folder: Path, *, seed: int, learning_rate: float, clip: float | None, share: float) -> dict:
    """Train once and measure before and after."""
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForMaskedLM.from_pretrained(options.base)
    args = DiffusionOPSDConfig(
        str(folder),
        **LENGTHS,
        updates_per_sample=options.updates,
        per_device_train_batch_size=options.batch,
        learning_rate=learning_rate,
        clip_value=clip,
        retained_share=share,
        divergence=options.divergence,
        num_samples=options.samples,
        max_steps=options.steps,
        seed=seed,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    before = accuracies(model, tokenizer, args, options)
    trainer = DiffusionOPSDTrainer(model, args, Dataset.from_list(rows_of("train", options.rows)), tokenizer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = accuracies(trainer.model, tokenizer, args, options)
    logs = [entry for entry in trainer.state.log_history if "samples/drawn" in entry]
    row = {"seed": seed, "learning_rate": learning_rate, "clip": clip, "share": share, "steps": options.steps}
    row |= {"split": options.split, "seconds": seconds}
    for name in before:
        row[name] = {"before": before[name], "after": after[name]}
    row["first"], row["last"] = ({name: entry.get(name) for name in LOGGED} for entry in (logs[0], logs[-1]))
    return row


def cell(scores: list[float]) -> str:
    """Mean and its 95 % interval over questions, in percent."""
    low, high = bootstrap_interval(scores)
    return f"{100 * sum(scores) / len(scores):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(rows: list[dict]) -> str:
    """A line a run."""
    lines = [
        "| rate | clip | share | seed | decoding | before | after | gain | divergence | first answers right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in ("greedy", "sampled"):
            before, after = row[name]["before"], row[name]["after"]
            gain = paired_difference(after, before)
            first, last = row["first"], row["last"]
            ends = [
                " to ".join("-" if part[key] is None else f"{part[key]:.2f}" for part in (first, last))
                for key in ("divergence", "samples/first_right")
            ]
            lines.append(
                f"| {row['learning_rate']:g} | {row['clip']} | {row['share']} | {row['seed']} | {name} | {cell(before)} | "
                f"{cell(after)} | {100 * gain.estimate:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] | {ends[0]} | {ends[1]} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Make the base where there is none, train every combination, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base; made there if it is missing")
    parser.add_argument("--base_steps", type=int, default=masked.DEFAULT_STEPS)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--clips", type=lambda text: None if text == "none" else float(text), nargs="+", default=[0.05])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="retained shares")
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--problems", type=int, default=150)
    parser.add_argument("--rows", type=int, default=320, help="training problems")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not Path(options.base).exists():
        masked.main(["--output", options.base, "--steps", str(options.base_steps)])
    rows = []
    for learning_rate in options.learning_rates:
        for clip in options.clips:
            for share in options.shares:
                for seed in options.seeds:
                    with tempfile.TemporaryDirectory() as folder:
                        chosen = {"learning_rate": learning_rate, "clip": clip, "share": share}
                        rows.append(run(options, Path(folder), seed=seed, **chosen))
                    print(json.dumps({key: rows[-1][key] for key in ("seed", "first", "last", "seconds")} | chosen))
    if options.output is not None:
        emit([{**row, **machine("cpu")} for row in rows], options.output)
    print(table(rows))


if __name__ == "__main__":
    main()
