# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd demo`: the embedded model distils itself with the shipped recipe, measured on held-out problems.

The recipe goes through the same entry as `trl-opsd opsd --config ...`. Base and trained model are sampled by the same
engine with the same settings, on problems that neither training nor the choice of the recipe has seen.
"""

import json
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..card import NUMBERS
from ..card.plots import plot_run, require_matplotlib
from ..commands.train import main as train
from ..evaluation.measures import EvaluationResult, Interval, evaluate, paired_difference
from . import build_rows, model_path

RECIPE = "opsd.yaml"
_TRAINING_PROBLEMS = 8192
_THINKING = False
_SEED = 1234
_EVALUATION = {"temperature": 1.0, "max_new_tokens": 128, "batch_size": 256}


def run_demo(
    output_dir: str, seeds: list[int], num_problems: int, num_samples: int, overrides: Sequence[str] = ()
) -> list[dict]:
    """Train once per seed and print what held-out accuracy became.

    Args:
        output_dir: a folder per seed is made in it, each a loadable model with its card, log and plot.
        seeds: seeds of training.
        num_problems: held-out problems, disjoint from all training problems.
        num_samples: samples a problem, at temperature 1.
        overrides: command-line arguments that override the recipe.

    Returns:
        One summary a seed, as written to `summary.json`.
    """
    require_matplotlib()
    start = time.perf_counter()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    data = output / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in build_rows("train", _TRAINING_PROBLEMS)))
    problems = build_rows("test", num_problems)
    print(f"Base model: {num_problems} held-out problems, {num_samples} samples each at temperature 1")
    base = measure(model_path(), problems, num_samples)
    summaries = []
    for seed in seeds:
        folder = output / f"seed-{seed}"
        arguments = ["--config", str(files(__package__) / RECIPE), "--dataset_name", str(data)]
        arguments += ["--model_name_or_path", model_path(), "--output_dir", str(folder), "--seed", str(seed)]
        trainer = train("opsd", [*arguments, *overrides])
        trained = measure(str(folder), problems, num_samples)
        gain = paired_difference(trained.per_question_scores, base.per_question_scores)
        trainer.create_model_card(model_name=folder.name, evaluation=card_lines(base, trained, gain))
        picture = plot_run(trainer.state.log_history, folder / "run.png", before=base.avg_at_k, after=trained.avg_at_k)
        summary = summarize_seed(seed, base, trained, gain)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
        summaries.append(summary)
        print(f"\n{table_of(seed, base, trained, gain)}")
        print(f"Model and card are in {folder}, the curves in {picture}.")
    print(f"{time.perf_counter() - start:.0f} s in all.")
    return summaries


def measure(path: str, problems: list[dict], num_samples: int) -> EvaluationResult:
    """Accuracy of a saved model on the problems, with the student's prompt."""
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return evaluate(
        model,
        tokenizer,
        problems,
        num_samples=num_samples,
        chat_template_kwargs={"enable_thinking": _THINKING},
        seed=_SEED,
        progress=True,
        **_EVALUATION,
    )


def summarize_seed(seed: int, base: EvaluationResult, trained: EvaluationResult, gain: Interval) -> dict:
    """The numbers of one seed, ready for JSON."""
    return {
        "seed": seed,
        "num_problems": len(base.per_question_scores),
        "num_samples": base.num_samples,
        "base": _numbers(base),
        "trained": _numbers(trained),
        "gain": gain._asdict(),
    }


def card_lines(base: EvaluationResult, trained: EvaluationResult, gain: Interval) -> list[dict]:
    """The numbers as the model card takes them."""
    common = {
        "dataset": "held-out problems of the demo",
        "num_questions": len(base.per_question_scores),
        "num_samples": base.num_samples,
        "seeds": [_SEED],
        "settings": {**_EVALUATION, "thinking": "on" if _THINKING else "off"},
    }
    rows = (("base", base, None), ("trained", trained, list(gain)))
    return [
        {**common, "model": name, "difference": difference, **{key: getattr(result, key) for key in NUMBERS}}
        for name, result, difference in rows
    ]


def table_of(seed: int, base: EvaluationResult, trained: EvaluationResult, gain: Interval) -> str:
    """The table that the demo prints."""
    k, numbers = base.num_samples, (_numbers(base), _numbers(trained))
    lines = [f"OPSD on held-out problems, seed {seed}", f"{'':36}{'base':>8}{'after':>8}"]
    for label, name, digits in (
        (f"avg@{k} at temperature 1", "avg", 3),
        (f"pass@{k}", "pass", 3),
        (f"majority@{k}", "majority", 3),
        ("mean completion length in tokens", "length", 1),
        ("share cut at the limit", "cut", 3),
        ("reflection markers per 1,000 tokens", "markers", 1),
    ):
        lines.append(f"{label:36}" + "".join(f"{result[name]:8.{digits}f}" for result in numbers))
    points = [100 * value for value in gain]
    lines.append(
        f"gain in avg@{k}: {points[0]:+.1f} points, 95 % bootstrap interval over questions "
        f"[{points[1]:+.1f}, {points[2]:+.1f}]"
    )
    return "\n".join(lines)


def _numbers(result: EvaluationResult) -> dict[str, float]:
    return {
        "avg": result.avg_at_k,
        "pass": result.pass_at_k,
        "majority": result.majority_at_k,
        "length": result.mean_completion_length,
        "cut": result.cut_share,
        "markers": result.markers_per_1000_tokens,
    }
