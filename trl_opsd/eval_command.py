# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd eval`: several models on several sets of questions, by the same engine with the same settings.

One JSON file per model, set and seed; those that exist are not run again. The first model is what the others are
compared with, question by question.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .adapters import FORMATS
from .arguments import UsageError
from .questions import BENCHMARKS, load_questions

_THINKING = {"on": {"enable_thinking": True}, "off": {"enable_thinking": False}, "default": {}}
_SHOWN = ("avg_at_k", "pass_at_k", "majority_at_k", "mean_completion_length", "cut_share", "markers_per_1000_tokens")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="trl-opsd eval",
        description="Sample and verify several models on several sets of questions; the first model is the one that "
        "the others are compared with. Finished files in --output_dir are not run again.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = ", ".join(BENCHMARKS)
    parser.add_argument("--models", nargs="+", required=True, help="Hub ids or folders, LoRA adapters too; base first")
    parser.add_argument("--datasets", nargs="+", required=True, help=f"{names}, a local file, or a Hub id")
    parser.add_argument("--split", default="test", help="split of a Hub id")
    parser.add_argument("--dataset_format", choices=[*FORMATS], help="how rows of files and Hub ids are read")
    parser.add_argument("--problem_column", help="question of files and Hub ids; without it a `prompt` column is read")
    parser.add_argument(
        "--solution_column", default="solution", help="gold solution of files and Hub ids, answer boxed"
    )
    parser.add_argument("--answer_column", help="gold answer without a text around it, instead of a solution")
    parser.add_argument("--prompt_template", help="question in `{prompt}`; asks benchmarks for a boxed answer if unset")
    parser.add_argument("--num_questions", type=int, help="only the first so many of each set")
    parser.add_argument("--num_samples", type=int, default=12, help="samples a question, the k of avg@k")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 decodes greedily")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus mass, in (0, 1]")
    parser.add_argument("--top_k", type=int, default=20, help="0 keeps all tokens")
    parser.add_argument("--max_new_tokens", type=int, default=38_912, help="length limit of a completion")
    parser.add_argument("--thinking", choices=[*_THINKING], default="default", help="`enable_thinking` of the template")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one evaluation per seed")
    parser.add_argument("--batch_size", type=int, default=32, help="completions sampled at once")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, bfloat16, float32")
    parser.add_argument("--output_dir", default="outputs/eval", help="a JSON file per model, set and seed, and a table")
    parser.add_argument("--save_completions", action="store_true", help="put the sampled texts into the files too")
    return parser


def run(arguments: list[str]) -> None:
    """Evaluate as a command line says; prints the table and writes it with `summary.json` into the output folder."""
    options = make_parser().parse_args(arguments)
    sets = {
        name: load_questions(name, options) for name in options.datasets
    }  # a wrong name shows before any model loads
    for model in options.models:
        _evaluate_model(model, sets, options)
    summary = summarize(options)
    output = Path(options.output_dir)
    (output / "summary.json").write_text(json.dumps(summary, indent=2))
    table = table_of(summary)
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nFiles are in {output}.")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for two results to be compared."""
    names = ("num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "prompt_template", "dtype")
    return {name: getattr(options, name) for name in (*names, "num_questions")}


def result_path(options: argparse.Namespace, model: str, dataset: str, seed: int) -> Path:
    """The file of one result."""
    folders = [name.strip("/").replace("/", "--") for name in (model, dataset)]
    return Path(options.output_dir, *folders, f"seed-{seed}.json")


def _evaluate_model(model: str, sets: dict[str, list], options: argparse.Namespace) -> None:
    """Run what is missing of a model; it is loaded only if something is."""
    loaded = None
    for dataset, rows in sets.items():
        for seed in options.seeds:
            path = result_path(options, model, dataset, seed)
            if path.exists():
                _check_settings(path, options)
                print(f"{path}: done before")
                continue
            loaded = loaded or load_model(model, options.dtype)
            print(f"{model} on {dataset}, seed {seed}: {len(rows)} questions, {options.num_samples} samples each")
            result = evaluate_rows(*loaded, rows, seed, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")  # a file that exists is whole
            record = {"model": model, "dataset": dataset, "seed": seed, "settings": settings_of(options), **result}
            unfinished.write_text(json.dumps(record, indent=1))
            unfinished.rename(path)


def _check_settings(path: Path, options: argparse.Namespace) -> None:
    before, now = json.loads(path.read_text())["settings"], settings_of(options)
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise UsageError(f"{path} was made with other settings: {'; '.join(changed)}. Choose another --output_dir.")


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    """A model, on the accelerator if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def evaluate_rows(model: Any, tokenizer: Any, rows: list, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One result as its file holds it."""
    from .evaluation import evaluate

    sampling = {
        name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens", "batch_size")
    }
    result = evaluate(
        model,
        tokenizer,
        rows,
        num_samples=options.num_samples,
        chat_template_kwargs=_THINKING[options.thinking],
        seed=seed,
        progress=True,
        **sampling,
    )
    record = asdict(result)
    if not options.save_completions:
        del record["completions"]
    return record


def summarize(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line per set and model: numbers averaged over seeds, an interval over questions, the difference to the first."""
    import numpy as np

    from .evaluation import bootstrap_interval, paired_difference

    lines = []
    for dataset in options.datasets:
        first: Sequence[float] | None = None
        for model in options.models:
            records = [json.loads(result_path(options, model, dataset, seed).read_text()) for seed in options.seeds]
            scores = np.mean([record["per_question_scores"] for record in records], axis=0).tolist()
            line = {"dataset": dataset, "model": model, "seeds": options.seeds, "num_questions": len(scores)}
            line |= {name: float(np.mean([record[name] for record in records])) for name in _SHOWN}
            line |= {"num_samples": options.num_samples, "avg_per_seed": [record["avg_at_k"] for record in records]}
            line["interval"] = bootstrap_interval(scores)
            line["difference"] = None if first is None else tuple(paired_difference(scores, first))
            first = scores if first is None else first
            lines.append(line)
    return lines


def table_of(summary: list[dict[str, Any]]) -> str:
    """The lines as a Markdown table, accuracies in percent, intervals of 95 % over questions."""
    k = summary[0]["num_samples"]
    head = ["set", "model", f"avg@{k}", "95 %", f"pass@{k}", f"maj@{k}", "length", "cut", "difference to first, 95 %"]
    rows = [head, ["---"] * len(head)]
    for line in summary:
        low, high = (100 * value for value in line["interval"])
        difference = "-"
        if line["difference"] is not None:
            difference = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in line["difference"]))
        percents = [f"{100 * line[name]:.1f}" for name in ("avg_at_k", "pass_at_k", "majority_at_k", "cut_share")]
        numbers = [percents[0], f"[{low:.1f}, {high:.1f}]", *percents[1:3], f"{line['mean_completion_length']:.0f}"]
        rows.append([line["dataset"], line["model"], *numbers, percents[3], difference])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
