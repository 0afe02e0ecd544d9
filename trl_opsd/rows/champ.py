# SPDX-License-Identifier: Apache-2.0
"""CHAMP: 270 competition problems with worked steps, hints and concepts, from the Python package `champ-dataset` (MIT)."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats import boxed, make_row

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "champ"
SPLITS = ("train", "test")
_TEST_EVERY = 5  # problems of a category

# What the authors say around an answer: notes in brackets, a second form of it, and sentences that hold a value.
_NOTES = re.compile(r"\s*\((?:i\.e\.|none of|no such)[^()]*(?:\([^()]*\)[^()]*)*\)")
_SECOND_FORM = re.compile(r",? or (?:equivalently|approximately|an equivalent form such as) ")
_SENTENCES = (
    re.compile(r"(.+) is the only possible value"),
    re.compile(r"The only possible value for the limit is (.+)"),
    re.compile(r"The limit exists and is equal to (.+)"),
    re.compile(r"The function is periodic, with a period of (.+)"),
    re.compile(r"Always greater than (.+)"),
    re.compile(
        r"(?:At (?:most|least) )?(-?\d+)(?: integer-valued)? (?:numbers?|values?|zeros?|roots?|pairs?|inequalities)"
    ),
)
_SUM = re.compile(r"sum_\(([^()]*)\)\^(\w+) ")
_WORDS = re.compile(r"[A-Z][a-z]+(?: [a-z]+)*|n times")


def load_champ(name: str, split: str) -> "Dataset":
    """Problems of a split, each with `prompt` and `solution` (the steps, then the boxed answer).

    Further columns are texts for a teacher and for a choice of problems: `hints` and `concepts` (lists), `category`,
    `identifier`. The split is fixed: every fifth problem of a category, in the order of the file, is a test problem.

    Args:
        name: of the file `v0.json` of the package, or `champ` for the installed package.
        split: "train" (216) or "test" (54).

    Raises:
        ValueError: there is no such file, package or split.
    """
    from datasets import Dataset  # `--help` reads this module's names, and has no time for it

    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}, the splits of champ.")
    parts = json.loads(_file(name).read_text(encoding="utf-8"))
    rows, places = [], {}
    for problem in parts["problems"].values():
        place = places[problem["category"]] = places.get(problem["category"], 0) + 1
        if (place % _TEST_EVERY == 0) == (split == "test"):
            rows.append(_row(problem, parts))
    return Dataset.from_list(rows)


def clean_answer(answer: str) -> str:
    """An answer without the words around it; one that is words alone is marked as text."""
    answer = _NOTES.sub("", answer).strip()
    first, *others = _SECOND_FORM.split(answer)
    answer = next((form for form in others if form.isdecimal() or first.startswith("sum_")), first)
    for sentence in _SENTENCES:
        found = sentence.fullmatch(answer)
        if found:
            answer = found[1]
    answer = _SUM.sub(r"\\sum_{\1}^{\2} ", answer)
    return f"\\text{{{answer}}}" if _WORDS.fullmatch(answer) else answer


def _row(problem: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    steps = [step["_text"] for step in problem["solution"]["steps"]]
    helps = problem["ch_list"]
    return {
        **make_row(problem["_text"], "\n".join([*steps, boxed(clean_answer(problem["_answer"]))])),
        "hints": [parts["hints"][key]["_text"] for key in helps if key in parts["hints"]],
        "concepts": [parts["concepts"][key]["_text"] for key in helps if key in parts["concepts"]],
        "category": problem["category"],
        "identifier": problem["identifier"],
    }


def _file(name: str) -> Path:
    if name != NAME:
        if not Path(name).is_file():
            raise ValueError(f"dataset_name={name!r}: no such file. Name the package's v0.json, or {NAME!r}.")
        return Path(name)
    found = find_spec("champ_dataset")
    if found is None:
        raise ValueError(
            f"dataset_name={name!r} needs the package champ-dataset, which is not installed: `pip install --no-deps "
            "champ-dataset==1.0.0`, or name its v0.json."
        )
    return Path(found.origin).parent / "dataset_files" / "v0.json"
