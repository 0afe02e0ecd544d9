# SPDX-License-Identifier: Apache-2.0
"""Sampled answers as lines of JSON, so that people can look at them with the tools that they have; docs/evaluation.md has the fields."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..verification.pool import Verdict
from .sampling import Completion


def sample_lines(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[Sequence[Any]]],
    verdicts: Sequence[Sequence[Sequence[Any]]],
    **source: Any,
) -> Iterator[dict[str, Any]]:
    """One mapping a sample, in the order of questions and of a question's samples.

    Args:
        rows: questions with `prompt` and `solution`.
        completions, verdicts: of each question those of its samples, as an `EvaluationResult` or the JSON of one holds them.
        source: what all of them are of, such as model, set and seed; it stands first.
    """
    questions = zip(rows, completions, verdicts, strict=True)
    for question, (row, samples, judged) in enumerate(questions):
        for place, (sample, verdict) in enumerate(zip(samples, judged, strict=True)):
            own, judgement = Completion(*sample), Verdict(*verdict)
            yield {
                **source,
                "question": question,
                "sample": place,
                "prompt": row["prompt"],
                "solution": row["solution"],
                "completion": own.text,
                "answer": judgement.answer,
                "score": None if judgement.is_right is None else int(judgement.is_right),
                "unscored": judgement.ran_out,
                "length": own.num_tokens,
                "cut": own.is_cut,
            }


def write_samples(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines to a JSONL file, which is whole as soon as it has its name."""
    unfinished = Path(f"{path}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.rename(path)
