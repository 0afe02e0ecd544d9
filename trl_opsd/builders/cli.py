# SPDX-License-Identifier: Apache-2.0
"""Options of `trl-opsd build`, their checks, and a run from rows to report."""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..commands.arguments import THINKING, CommandParser, check_writable
from ..errors import UsageError
from ..rows.formats import FORMATS
from ..teacher.contexts import TEACHER_PROMPT_TEMPLATE

BUILDERS = {
    "mixsd": "tokens of the bare prompt and of the prompt with the solution, mixed; right completions are kept",
    "spd": "completions sampled with keys and values projected onto what right answers depend on",
}
# Where something is written, or what of the journal is; everything else changes what is sampled.
_NOT_SAMPLING = ("output", "failures", "dataset_name", "builder")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command, a set for each builder."""
    parser = CommandParser(
        prog="trl-opsd build", description="Make SFT data by sampling; JSONL in, JSONL out, resumable."
    )
    kinds = parser.add_subparsers(dest="builder", required=True, metavar="BUILDER")
    own = {"mixsd": _add_mixsd, "spd": _add_spd}
    for name, text in BUILDERS.items():
        one = kinds.add_parser(
            name, help=text, description=f"{text}.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        _add_shared(one)
        own[name](one)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True, help="Hub id or folder of the model")
    parser.add_argument("--dataset_name", required=True, help="a local file or a Hub id, as in training")
    parser.add_argument("--output", required=True, help="JSONL file; OUTPUT.journal beside it lets a build go on")
    parser.add_argument("--split", default="train", help="split of a Hub id")
    parser.add_argument("--dataset_format", choices=list(FORMATS), help="how rows are read")
    parser.add_argument("--problem_column", help="question; without it a `prompt` column is read")
    parser.add_argument("--solution_column", default="solution", help="reference solution, answer boxed")
    parser.add_argument("--num_rows", type=int, help="only the first so many")
    parser.add_argument("--prompt_template", help="question in `{prompt}`; give the same to `trl-opsd sft`")
    parser.add_argument("--thinking", choices=[*THINKING], default="off", help="`enable_thinking` of the template")
    parser.add_argument("--max_new_tokens", type=int, default=4096, help="length limit of a completion")
    parser.add_argument("--batch_size", type=int, default=16, help="rows sampled at once")
    parser.add_argument("--seed", type=int, default=0, help="each row and try has random numbers of its own")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, bfloat16, float32")
    parser.add_argument("--verifier", default="math", help="math, exact, choice, or module:function, as in `eval`")
    parser.add_argument("--top_k", type=int, default=64, help="so many likeliest tokens are drawn from; 0 for all")


def _add_failures(parser: argparse.ArgumentParser, default: str) -> None:
    text = "completions that are not right: discard, or write with `correct` false"
    parser.add_argument("--failures", choices=["discard", "write"], default=default, help=text)


def _add_mixsd(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--naive_share", type=float, default=0.3, help="probability of the bare prompt, lambda, 0 to 1")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token of whose turn it is"
    )
    parser.add_argument("--tries", type=int, default=10, help="completions of a row until one is right")
    parser.add_argument(
        "--expert_template",
        default=TEACHER_PROMPT_TEMPLATE,
        help="last user turn of the other prompt, with {prompt} and {solution} (default: that of opsd's teacher)",
    )
    _add_failures(parser, "discard")


def _add_spd(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 decodes greedily")
    parser.add_argument("--calibration_rows", type=int, default=50, help="first rows, whose boxed answers are read")
    parser.add_argument("--rank_share", type=float, default=0.5, help="dimensions that stay; 1 is plain sampling")
    parser.add_argument("--layers", type=int, nargs="+", help="blocks that are projected; middle and last if unset")
    _add_failures(parser, "write")
    parser.set_defaults(top_k=0)


def run(arguments: list[str]) -> None:
    """Build as a command line says; writes the output and prints the report."""
    options = make_parser().parse_args(arguments)
    check(options)
    start = time.perf_counter()

    from .build import build, kept_entries, output_row, report
    from .journal import Journal, write_rows

    builder = import_module(f".{options.builder}", __package__)
    check_writable(Path(options.output).parent)
    rows = load(options)
    journal = Journal(options.output, settings_of(options, rows))
    if journal.entries:
        print(f"{journal.path}: {len(journal.entries)} of {len(rows)} rows were done before")
    prompt = partial(bare_prompt, options)
    source = partial(builder.make_source, options, prompt, THINKING[options.thinking], rows)
    build(rows, source, plan_of(options), journal)
    kept = kept_entries(journal, options.failures == "write", getattr(builder, "NEVER", ()))
    write_rows(options.output, [output_row(rows[entry["row"]], entry, options.seed) for entry in kept])
    print(f"{report(journal, kept, builder.NAMES, start)}\nThe rows are in {options.output}.")


def check(options: argparse.Namespace) -> None:
    """Check the options before anything is read.

    Raises:
        UsageError: an option outside its range; names it, its value and what to set.
    """
    from ..verification import check_verifier

    least = {
        "num_rows": 1,
        "max_new_tokens": 1,
        "batch_size": 1,
        "tries": 1,
        "calibration_rows": 1,
        "temperature": 0,
        "top_k": 0,
    }
    for name, lowest in least.items():
        value = getattr(options, name, None)
        if value is not None and not value >= lowest:
            raise UsageError(f"--{name} {value}: set it to {lowest} or more.")
    share = getattr(options, "naive_share", 0)
    if not 0 <= share <= 1:
        raise UsageError(f"--naive_share {share}: set it to a probability, from 0 to 1.")
    check_verifier(options.verifier, "--verifier")
    import_module(f".{options.builder}", __package__).check(options)


def load(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `prompt` and, where there is one, `solution`.

    Raises:
        ValueError: a file or a row that cannot be read; names it.
    """
    from ..commands.train import DataArguments, load_rows
    from ..rows.checks import check_dataset

    names = ("dataset_name", "dataset_format", "problem_column", "solution_column")
    rows = load_rows(DataArguments(**{name: getattr(options, name) for name in names}), options.split)
    if options.num_rows is not None:
        rows = rows.select(range(min(options.num_rows, len(rows))))
    check_dataset(rows, f"dataset_name={options.dataset_name!r}", needs_solution=False)
    return [{name: row[name] for name in ("prompt", "solution") if name in row} for row in rows]


def bare_prompt(options: argparse.Namespace, row: Mapping[str, Any]) -> Any:
    """A row's prompt as the student is to read it in SFT."""
    from ..rows.formats import rewrite_prompt
    from ..rows.texts import as_text_turns

    prompt = as_text_turns(row["prompt"])
    return (
        prompt
        if options.prompt_template is None
        else rewrite_prompt({"prompt": prompt}, options.prompt_template)["prompt"]
    )


def settings_of(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What must be the same for a build to go on: the options that change what is sampled, and the rows."""
    told = {name: value for name, value in sorted(vars(options).items()) if name not in _NOT_SAMPLING}
    text = json.dumps(rows, sort_keys=True)
    return {"builder": options.builder, **told, "sha256 of the rows": hashlib.sha256(text.encode()).hexdigest()}


def plan_of(options: argparse.Namespace) -> Any:
    """The loop's settings."""
    from .build import Plan

    shared = ("batch_size", "seed", "verifier", "max_new_tokens", "temperature", "top_k")
    tries = 1
    if options.builder == "mixsd":
        from .mixsd import useful_tries

        tries = useful_tries(options.tries, options.naive_share, options.temperature)
        if tries < options.tries:
            print("--tries: 1 is enough, because a greedy completion of one prompt alone repeats itself.")
    needs_reference = options.builder == "mixsd" or options.failures == "discard"
    return Plan(needs_reference, tries, **{name: getattr(options, name) for name in shared})
