# SPDX-License-Identifier: Apache-2.0
"""Accuracy over sampled tokens: how many tokens a method needs to reach an accuracy, at the rate that validation chose for it.

    python benchmarks/efficiency.py --output_dir outputs/efficiency [--workers 2]
    python -m trl_opsd.demo.build --hard --output outputs/hard      # a base of longer chains
    python benchmarks/efficiency.py --hard outputs/hard --output_dir outputs/efficiency-hard --levels 0.25 0.5 0.8

Every method gets the learning rate, out of one grid, whose mean accuracy over the measured steps is best on validation problems
with the first seed. It then trains once a seed and is measured on test problems. Runs already in the folder are not repeated.
SFT samples nothing: its tokens are those of the references that it reads.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import miniature
import numpy as np

METHODS = ("OPSD", "OGLS-SD", "SDPO", "GRPO", "SFT on references")
BASELINE = "GRPO"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
HARD_LIMIT = 160  # tokens of a rollout on the chains of eight to ten operations
DRAWS = 2000


@dataclass(frozen=True)
class Plan:
    """What all runs share.

    Attributes:
        output: folder of the results.
        hard: folder of the hard base; None for the embedded one.
        steps: optimizer steps of a run.
        every: steps between two measurements.
        problems: that are measured.
        samples: of each of them.
        training_problems: rows of training.
    """

    output: Path
    hard: str | None = None
    steps: int = 40
    every: int = 5
    problems: int = 120
    samples: int = 4
    training_problems: int = miniature.TRAINING_PROBLEMS

    def rows(self, split: str, count: int) -> list[dict[str, Any]]:
        """Problems of a split, as long as the base's chains are."""
        from trl_opsd.demo.task import HARD_NUM_OPERATIONS, NUM_OPERATIONS, build_rows

        return build_rows(split, count, num_operations=HARD_NUM_OPERATIONS if self.hard else NUM_OPERATIONS)


class Curve(NamedTuple):
    """Of one run, a measurement at a time: tokens so far, and the accuracy of each problem."""

    tokens: np.ndarray  # (P,)
    scores: np.ndarray  # (P, problems)


# One run


def run_one(plan: Plan, name: str, rate: float, seed: int, split: str) -> Path:
    """Train and measure along the way; the file with the curve, which is kept where it is there."""
    folder = plan.output / split / f"{miniature.slug(name)}-{rate:g}-{seed}"
    result = folder / "curve.json"
    if result.exists():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    run = {**miniature.RUNS, **miniature.family()}[name]
    overrides = settings_of(plan, run, rate)
    rows = plan.rows("train", plan.training_problems)
    trainer = miniature.make_trainer(run, folder, seed, overrides, model=plan.hard, rows=rows)
    records = measured_run(trainer, plan, split)
    log = trainer.state.log_history
    curve = {
        "name": name,
        "rate": rate,
        "seed": seed,
        "steps": [record["step"] for record in records],
        "tokens": [_tokens_at(record["step"], run, log, rows, trainer) for record in records],
        "scores": [record["per_question_scores"] for record in records],
    }
    result.write_text(json.dumps(curve))
    print(f"{split} {folder.name}: {' '.join(f'{np.mean(scores):.3f}' for scores in curve['scores'])}", flush=True)
    return result


def settings_of(plan: Plan, run: miniature.Run, rate: float) -> dict[str, Any]:
    """What a run has beside the miniature's settings."""
    overrides = {"learning_rate": rate, "max_steps": plan.steps, "logging_steps": plan.every}
    if plan.hard and run.kind != "sft":
        overrides["max_completion_length"] = HARD_LIMIT
        overrides |= {"distillation_length": HARD_LIMIT} if "distillation_length" in run.settings else {}
    return overrides


def measured_run(trainer, plan: Plan, split: str) -> list[dict[str, Any]]:
    """Train; what was measured before the first step and every so many steps."""
    from trl_opsd.evaluation.callback import EvaluationCallback

    callback = EvaluationCallback(
        trainer,
        plan.rows(split, plan.problems),
        num_samples=plan.samples,
        every=plan.every,
        seed=1234,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=HARD_LIMIT if plan.hard else miniature.MEASURED["max_new_tokens"],
        batch_size=512,
        chat_template_kwargs=miniature.SAMPLING["chat_template_kwargs"],
    )
    trainer.add_callback(callback)
    trainer.train()
    return sorted(callback.records, key=lambda record: record["step"])


def _tokens_at(step: int, run: miniature.Run, log: list[dict], rows: list[dict], trainer) -> float:
    if run.kind == "sft":
        tokenizer, batch = trainer.processing_class, miniature.ROLLOUTS
        lengths = [len(tokenizer(row["solution"])["input_ids"]) + 1 for row in rows]
        return step * batch * float(np.mean(lengths))
    return miniature.sampled_tokens([entry for entry in log if entry["step"] <= step], miniature.SETTINGS)


def run_all(plan: Plan, jobs: Sequence[tuple], workers: int) -> list[dict]:
    """The results of (method, rate, seed, split), in their order."""
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(run_one, plan, *job) for job in jobs]
        return [json.loads(future.result().read_text()) for future in futures]


# From curves to numbers


def choose_rates(results: Sequence[dict]) -> dict[str, float]:
    """Of each method the rate with the best mean accuracy over what was measured behind the first step."""
    found: dict[str, dict[float, float]] = {}
    for result in results:
        found.setdefault(result["name"], {})[result["rate"]] = float(np.mean(result["scores"][1:]))
    return {name: max(rates, key=rates.get) for name, rates in found.items()}


def curves_of(results: Sequence[dict]) -> dict[str, Curve]:
    """Of each method the mean over its seeds."""
    found: dict[str, list[dict]] = {}
    for result in results:
        found.setdefault(result["name"], []).append(result)
    return {
        name: Curve(*(np.mean([run[key] for run in runs], axis=0) for key in ("tokens", "scores")))
        for name, runs in found.items()
    }


def tokens_to(level: float, tokens: Sequence[float], accuracies: Sequence[float]) -> float:
    """Tokens at which an accuracy is first reached, linear between two measurements; infinite where it never is."""
    for place, accuracy in enumerate(accuracies):
        if accuracy >= level:
            if place == 0:
                return float(tokens[0])
            before, after = accuracies[place - 1], accuracy
            share = (level - before) / (after - before)
            return float(tokens[place - 1] + share * (tokens[place] - tokens[place - 1]))
    return math.inf


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the middle 95 %; an end may be infinite."""
    low, high = np.quantile(np.asarray(values), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def tokens_of_draws(level: float, curve: Curve, draws: np.ndarray) -> list[float]:
    """`tokens_to` for each drawn set of problems, (draws, problems)."""
    accuracies = curve.scores[:, draws].mean(axis=2)  # (P, draws)
    return [tokens_to(level, curve.tokens, column) for column in accuracies.T]


def reduce(curves: dict[str, Curve], levels: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """Of each method, for each level: tokens, their interval, GRPO's tokens over them, and the ratio's interval.

    Intervals are bootstraps over problems, the same draws for every method. A ratio stands where both reach the level.
    """
    problems = next(iter(curves.values())).scores.shape[1]
    draws = np.random.default_rng(0).integers(problems, size=(DRAWS, problems))
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in curves}
    for level in levels:
        exact = {
            name: tokens_to(level, curve.tokens, curve.scores.mean(axis=1).tolist()) for name, curve in curves.items()
        }
        drawn = {name: np.asarray(tokens_of_draws(level, curve, draws)) for name, curve in curves.items()}
        for name in curves:
            cell = {"level": level, "tokens": exact[name], "interval": interval(drawn[name])}
            if BASELINE in curves and math.isfinite(exact[name]) and math.isfinite(exact[BASELINE]) and exact[name]:
                reached = np.isfinite(drawn[name]) & np.isfinite(drawn[BASELINE]) & (drawn[name] > 0)
                ratios = drawn[BASELINE][reached] / drawn[name][reached]
                cell |= {"ratio": exact[BASELINE] / exact[name], "ratio_interval": interval(ratios)}
            table[name].append(cell)
    return table


# Reporting


def rates_table(results: Sequence[dict]) -> str:
    """Mean accuracy on validation problems, a method a line and a rate a column."""
    rates = sorted({result["rate"] for result in results})
    chosen = choose_rates(results)
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " | chosen |", "|" + "---|" * (len(rates) + 2)]
    for name in chosen:
        means = {result["rate"]: np.mean(result["scores"][1:]) for result in results if result["name"] == name}
        cells = [f"{means[rate]:.3f}" if rate in means else "" for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} | {chosen[name]:g} |")
    return "\n".join(lines)


def tokens_table(curves: dict[str, Curve], levels: Sequence[float], rates: dict[str, float]) -> str:
    """Tokens to each level in thousands, and the ratio to GRPO."""
    head = [f"thousand tokens to {level:g} [95 %], {BASELINE} / it" for level in levels]
    lines = ["| | rate | base | last | " + " | ".join(head) + " |", "|" + "---|" * (len(levels) + 4)]
    for name, cells in reduce(curves, levels).items():
        ends = [f"{value:.3f}" for value in curves[name].scores.mean(axis=1)[[0, -1]]]
        told = [_cell(cell, curves[name].tokens[-1]) for cell in cells]
        lines.append(f"| {name} | {rates[name]:g} | {' | '.join([*ends, *told])} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any], budget: float) -> str:
    def told(tokens: float) -> str:
        return f"{tokens / 1000:.1f}" if math.isfinite(tokens) else f"> {budget / 1000:.1f}"

    text = f"{told(cell['tokens'])} [{', '.join(map(told, cell['interval']))}]"
    if "ratio" in cell:
        text += ", {:.2f} [{:.2f}, {:.2f}]".format(cell["ratio"], *cell["ratio_interval"])
    return text


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Accuracy over tokens, with bands over problems."""
    from matplotlib.figure import Figure

    from trl_opsd.evaluation.measures import bootstrap_interval

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, (tokens, scores) in curves.items():
        low, high = zip(*(bootstrap_interval(row.tolist()) for row in scores), strict=True)
        (line,) = axes.plot(tokens / 1000, scores.mean(axis=1), marker="o", ms=4, label=name)
        axes.fill_between(tokens / 1000, low, high, alpha=0.15, color=line.get_color())
    axes.set(xlabel="thousand tokens sampled (SFT: read)", ylabel="accuracy on test problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def report(plan: Plan, validation: list[dict], test: list[dict], levels: Sequence[float]) -> str:
    """Both tables; the picture is drawn beside the results."""
    curves = curves_of(test)
    plot(curves, plan.output / "efficiency.png")
    tables = [rates_table(validation), tokens_table(curves, levels, choose_rates(validation))]
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for and not done yet, then print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/efficiency"))
    parser.add_argument("--hard", metavar="FOLDER", help="the base that `python -m trl_opsd.demo.build --hard` made")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Plan.steps, help="optimizer steps of a run")
    parser.add_argument("--every", type=int, default=Plan.every, help="steps between two measurements")
    parser.add_argument("--problems", type=int, default=Plan.problems, help="measured, of each split")
    parser.add_argument("--samples", type=int, default=Plan.samples, help="of each problem")
    parser.add_argument("--training_problems", type=int, default=Plan.training_problems)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.6, 0.8, 0.95], help="accuracies to be reached")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    own = ("hard", "steps", "every", "problems", "samples", "training_problems")
    plan = Plan(options.output_dir, **{name: getattr(options, name) for name in own})
    grid = [(name, rate, options.seeds[0], "validation") for name in options.methods for rate in options.rates]
    validation = run_all(plan, grid, options.workers)
    print(rates_table(validation), flush=True)
    chosen = choose_rates(validation)
    runs = [(name, chosen[name], seed, "test") for seed in options.seeds for name in options.methods]
    test = run_all(plan, runs, options.workers)
    print(report(plan, validation, test, options.levels))


if __name__ == "__main__":
    main()
