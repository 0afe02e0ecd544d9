# SPDX-License-Identifier: Apache-2.0
"""Sets of questions to evaluate on: the benchmarks of the papers, local files and Hub ids."""

import argparse
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError
from ...rows.formats import FORMATS, boxed, make_row, rewrite_prompt
from ...verification import warn_of_golds, which_verify


@dataclass(frozen=True)
class Benchmark:
    """Where a set of questions is, and which of its columns are question and gold answer.

    Attributes:
        dataset: Hub id.
        split: of the dataset.
        problem, answer: text columns; an answer is boxed so that it can be read. None with a `format`.
        config: name of the dataset's configuration.
        format: a key of `adapters.FORMATS`, for rows that need more.
    """

    dataset: str
    split: str
    problem: str | None = "problem"
    answer: str | None = "answer"
    config: str | None = None
    format: str | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train"),
    "aime25": Benchmark("yentinglin/aime_2025", "train"),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test"),
    "gsm8k": Benchmark("openai/gsm8k", "test", None, None, config="main", format="gsm8k"),
}
PROMPT_TEMPLATE = "{prompt}\n\nReason step by step and put the final answer in \\boxed{}."


def load_questions(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `prompt` and `solution` of a benchmark, a file or a Hub id.

    Args:
        name: a key of `BENCHMARKS`, a local file, or a Hub id.
        options: of `trl-opsd eval`: columns, split, template and number of questions.

    Raises:
        ValueError: a column is missing, or the set is empty.
    """
    from datasets import load_dataset

    benchmark = BENCHMARKS.get(name)
    if benchmark is not None:
        rows = load_dataset(benchmark.dataset, benchmark.config, split=benchmark.split)
        rows = [benchmark_row(row, benchmark) for row in rows]
    else:
        rows = _load_own(name, options)
    template = options.prompt_template or (PROMPT_TEMPLATE if benchmark is not None else "{prompt}")
    rows = [{**row, **rewrite_prompt(row, template)} for row in rows[: options.num_questions]]
    if not rows:
        raise UsageError(f"--datasets {name}: no question.")
    golds = [row["solution"] for row in rows]
    unread = sum(not read for read in which_verify(golds, options.verifier))
    if unread:
        print(
            f"{name}: {unread} of {len(rows)} gold answers cannot be read and count as wrong; see --answer_column, --verifier."
        )
    warning = warn_of_golds(golds, options.verifier, name)
    if warning is not None:
        print(f"warning: {warning}")
    return rows


def _load_own(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    from ..train import DataArguments, load_rows

    solution = options.answer_column or options.solution_column
    columns = {"dataset_format": options.dataset_format, "problem_column": options.problem_column}
    rows = list(load_rows(DataArguments(dataset_name=name, solution_column=solution, **columns), options.split))
    if options.answer_column is None:
        return rows
    return [{**row, "solution": boxed(row["solution"])} for row in rows]


def benchmark_row(row: dict[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    """Prompt and gold solution of a benchmark's row."""
    if benchmark.format is not None:
        return FORMATS[benchmark.format](row)
    return make_row(row[benchmark.problem], boxed(row[benchmark.answer]))
