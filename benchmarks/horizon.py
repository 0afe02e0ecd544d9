# SPDX-License-Identifier: Apache-2.0
"""What a shorter or growing rollout horizon saves and costs: OPSD on the embedded model.

    python benchmarks/horizon.py --output_dir outputs/horizon

One run a row and seed, in turn, each alone on one thread: accuracy of the last model on test problems, tokens sampled and
distilled, seconds of training. A rollout of the embedded model is 27 tokens, so 8 tokens reach its second result.
"""

import argparse
import json
import os
import time
from pathlib import Path

from miniature import TEACHER, Run, measure, slug, train

HORIZONS = {
    "whole rollouts": {},
    "first 8 distilled, whole sampled": {"distillation_length": 8},
    "first 8 sampled (TOPD)": {"max_completion_length": 8},
    "first 16 sampled (TOPD)": {"max_completion_length": 16},
    "8 growing to 40 in 45 steps (POPD)": {"distillation_length": "8..40 in 45"},
}


def run_one(name: str, seed: int, output: Path, problems: int) -> dict:
    """Train and measure one run; one done before is read."""
    from trl_opsd.demo import build_rows

    folder = output / f"{slug(name)}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    train(Run("opsd", {**TEACHER, **HORIZONS[name]}), folder, seed, {})
    seconds = time.perf_counter() - start
    log = json.loads((folder / "log.json").read_text())
    steps = [entry for entry in log if "completions/mean_length" in entry]
    lengths = [entry["completions/mean_length"] for entry in steps]
    numbers = measure(str(folder), build_rows("test", problems), seed)
    row = {
        "horizon": name,
        "seed": seed,
        "avg": numbers["avg"],
        "mean_sampled_tokens": sum(lengths) / len(lengths),
        "train_s": round(seconds, 1),
        "time_loss_s": sum(entry["time/loss"] for entry in steps) / len(steps),
        "time_teacher_s": sum(entry["time/teacher_forward"] for entry in steps) / len(steps),
    }
    result.write_text(json.dumps(row))
    return row


def main() -> None:
    """Print a JSON line a run and a table of means, the first row the measure of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/horizon"))
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [run_one(name, seed, options.output_dir, options.problems) for seed in options.seeds for name in HORIZONS]
    print(*map(json.dumps, rows), sep="\n")
    print(
        "\n| horizon | avg@16 | seeds | sampled tokens a rollout | training, / whole | loss, / whole | teacher, / whole |"
    )
    print("|---|---|---|---|---|---|---|")

    def mean(name, key):
        values = [row[key] for row in rows if row["horizon"] == name]
        return sum(values) / len(values)

    whole = next(iter(HORIZONS))
    for name in HORIZONS:
        seeds = " ".join(f"{row['avg']:.3f}" for row in rows if row["horizon"] == name)
        ratios = [f"{mean(name, key) / mean(whole, key):.2f}" for key in ("train_s", "time_loss_s", "time_teacher_s")]
        print(
            f"| {name} | {mean(name, 'avg'):.3f} | {seeds} | {mean(name, 'mean_sampled_tokens'):.1f} | {' | '.join(ratios)} |"
        )


if __name__ == "__main__":
    main()
