# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd eval`: several models on several sets of questions, by the same engine with the same settings.

One JSON file per model, set and seed; those that exist are not run again. The first model is what the others are
compared with, question by question.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...rows import champ
from ...rows.formats import FORMATS
from ...verification import check_verifier
from ..arguments import THINKING, CommandParser, check_writable
from .models import RULES, EvaluatedModel, resolve_models
from .questions import BENCHMARKS, load_questions
from .samples import check_sample_files, leaves_samples, write_all_samples
from .summary import add_to_cards, check_cards, summarize, table_of

BACKENDS = ("transformers", "vllm")
_BATCH_SIZE = 32


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = CommandParser(
        prog="trl-opsd eval",
        description="Sample and verify several models on several sets of questions; the first model is the one that "
        "the others are compared with. Finished files in --output_dir are not run again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = ", ".join(BENCHMARKS)
    parser.add_argument("--models", nargs="+", required=True, help="Hub ids or folders, LoRA adapters too; base first")
    parser.add_argument(
        "--checkpoints",
        choices=RULES,
        default="last",
        help="of a run's folder (it holds checkpoint-*): the model at its end, or its earlier checkpoints too as a course",
    )
    parser.add_argument("--datasets", nargs="+", required=True, help=f"{names}, a local file, or a Hub id")
    parser.add_argument("--split", default="test", help="split of a Hub id")
    parser.add_argument(
        "--dataset_format", choices=[*FORMATS, champ.NAME], help="how rows of files and Hub ids are read"
    )
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
    parser.add_argument("--thinking", choices=[*THINKING], default="default", help="`enable_thinking` of the template")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one evaluation per seed")
    parser.add_argument(
        "--verifier",
        default="math",
        help="how answers are compared: math (math-verify), exact (as text, leading zeros count), choice (letters), or "
        "module:function, your own, of completion and solution",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="transformers", help="what samples")
    parser.add_argument(
        "--batch_size", type=int, help=f"completions transformers samples at once; {_BATCH_SIZE} if unset"
    )
    parser.add_argument("--vllm_options", type=json.loads, help="JSON of further arguments of vllm.LLM")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, bfloat16, float32")
    parser.add_argument("--output_dir", default="outputs/eval", help="a JSON file per model, set and seed, and a table")
    parser.add_argument("--add_to_card", action="store_true", help="put base and result into each run's README.md")
    parser.add_argument("--save_completions", action="store_true", help="put the sampled texts into the files too")
    parser.add_argument("--samples", help="a JSONL file that gets one line a sample: prompt, completion, score, length")
    parser.add_argument(
        "--inspect_logs", help="a folder that gets a log for inspect-ai per model and set: `inspect view`"
    )
    return parser


def run(arguments: list[str]) -> None:
    """Evaluate as a command line says; prints the table and writes it with `summary.json` into the output folder."""
    options = make_parser().parse_args(arguments)
    _check_backend(options)
    check_sample_files(options)
    try:
        check_verifier(options.verifier, "--verifier")
    except ValueError as error:
        raise UsageError(str(error)) from error
    models = resolve_models(options.models, options.checkpoints)
    if options.add_to_card:
        check_cards(models)
    check_writable(options.output_dir)
    # A wrong name shows before any model loads.
    sets = {name: load_questions(name, options) for name in options.datasets}
    for model in models:
        _check_finished(model.path, options)
    for model in models:
        _evaluate_model(model.path, sets, options)
    records = _read_records(models, options)
    write_all_samples(records, sets, options)
    summary = summarize(models, records, options.datasets, options.seeds, settings_of(options))
    output = Path(options.output_dir)
    (output / "summary.json").write_text(json.dumps(summary, indent=2))
    table = table_of(summary)
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nFiles are in {output}.")
    for folder in add_to_cards(models, summary) if options.add_to_card else ():
        print(f"The card of {folder} shows the numbers.")


def _check_backend(options: argparse.Namespace) -> None:
    """Refuse settings that the chosen backend would pass over."""
    if options.backend == "vllm" and options.batch_size is not None:
        raise UsageError("--batch_size is of --backend transformers; vLLM batches by itself. Leave it out.")
    if options.backend != "vllm" and options.vllm_options is not None:
        raise UsageError("--vllm_options is of --backend vllm; leave it out or set the backend.")


def _read_records(models: list[EvaluatedModel], options: argparse.Namespace) -> dict[tuple[str, str], list]:
    return {
        (model.path, dataset): [
            json.loads(result_path(options, model.path, dataset, seed).read_text()) for seed in options.seeds
        ]
        for model in models
        for dataset in options.datasets
    }


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for two results to be compared."""
    names = ("num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "prompt_template", "dtype")
    names = (*names, "backend", "verifier")
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
                print(f"{path}: done before")
                continue
            if loaded is None:
                loaded = _load(model, options)
                if note := note_of_mode(loaded[1], rows[0]["prompt"], options.thinking):
                    print(note)
            print(f"{model} on {dataset}, seed {seed}: {len(rows)} questions, {options.num_samples} samples each")
            result = evaluate_rows(*loaded, rows, seed, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")  # a file that exists is whole
            record = {"model": model, "dataset": dataset, "seed": seed, "settings": settings_of(options), **result}
            unfinished.write_text(json.dumps(record, indent=1))
            unfinished.rename(path)


def _check_finished(model: str, options: argparse.Namespace) -> None:
    """Check, before anything is loaded, that the files of a model that exist are of these settings and hold what is asked for."""
    for dataset in options.datasets:
        for path in (result_path(options, model, dataset, seed) for seed in options.seeds):
            if path.exists():
                record = json.loads(path.read_text())
                _check_settings(path, record, options)
                if leaves_samples(options) and "verdicts" not in record:
                    raise UsageError(
                        f"{path} was made without its completions, which --samples and --inspect_logs write. Choose another "
                        "--output_dir, or remove the file so that it is made again."
                    )


def _check_settings(path: Path, record: dict[str, Any], options: argparse.Namespace) -> None:
    before = {"verifier": "math", **record["settings"]}
    now = settings_of(options)
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise UsageError(f"{path} was made with other settings: {'; '.join(changed)}. Choose another --output_dir.")


def _load(model: str, options: argparse.Namespace) -> tuple[Any, Any]:
    if options.backend == "vllm":
        from ...evaluation.vllm_sampling import load_engine

        return load_engine(model, options.dtype, options.vllm_options)
    return load_model(model, options.dtype)


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    """A model, on the accelerator if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def note_of_mode(tokenizer: Any, prompt: list[dict], thinking: str) -> str:
    """A sentence where the mode that the completions are sampled in was not chosen and makes a difference; else nothing."""
    from ...evaluation.sampling import render_prompt

    if thinking != "default":
        return ""
    own, off = (render_prompt(tokenizer, prompt, THINKING[mode]) for mode in ("default", "off"))
    return (own != off) * (
        "note: the chat template has a thinking switch, and --thinking was left out, so the template's own mode is measured. A run of "
        "trl-opsd trains with thinking off unless its chat_template_kwargs say otherwise: give --thinking off to measure what was trained."
    )


def evaluate_rows(model: Any, tokenizer: Any, rows: list, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One result as its file holds it."""
    from ...evaluation.measures import summarize as summarize_samples

    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    if options.backend == "vllm":
        from ...evaluation.vllm_sampling import generate_completions
    else:
        from ...evaluation.sampling import generate_completions

        sampling["batch_size"] = options.batch_size or _BATCH_SIZE
    samples = generate_completions(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        num_samples=options.num_samples,
        chat_template_kwargs=THINKING[options.thinking],
        seed=seed,
        progress=True,
        **sampling,
    )
    record = asdict(summarize_samples(samples, [row["solution"] for row in rows], verifier=options.verifier))
    if not (options.save_completions or leaves_samples(options)):
        del record["completions"], record["verdicts"]
    return record
