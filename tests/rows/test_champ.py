# SPDX-License-Identifier: Apache-2.0
"""CHAMP's file as rows: the split, the texts beside the solution, and answers without the words around them."""

import json

import pytest

from trl_opsd.commands.train import DataArguments, load_rows
from trl_opsd.rows import champ
from trl_opsd.rows.texts import is_missing
from trl_opsd.verification import verify

ANSWERS = {
    "239": "239",
    "C(10, 5), or equivalently 252": "252",
    "5/14, or approximately 35.7%": "5/14",
    "sum_(i=1)^n i^3, or equivalently (n(n+1)/2)^2": "(n(n+1)/2)^2",
    "sum_(k=1)^n 1/k": "\\sum_{k=1}^{n} 1/k",
    "100 (i.e., all values)": "100",
    "((-1)^(n+1)+n+1)/(n+2) (i.e., 1 if for odd n, and n/(n+2) for even n)": "((-1)^(n+1)+n+1)/(n+2)",
    "-3 is the only possible value": "-3",
    "The limit exists and is equal to (a+3b)/2": "(a+3b)/2",
    "At most 0 integer-valued roots (i.e., no integer roots)": "0",
    "2 inequalities": "2",
    "x=6, y=5": "x=6, y=5",
    "No integer solutions": "\\text{No integer solutions}",
    "No": "\\text{No}",
}


@pytest.fixture
def file(tmp_path):
    """Two categories of six and five problems, each with a hint and a concept."""

    def problem(category, number):
        return {
            "identifier": f"P_{category}_{number}",
            "_text": f"What is {number}+{number}?",
            "category": category,
            "solution": {"steps": [{"_text": "Double it."}, {"_text": f"So it is {2 * number}."}]},
            "_answer": f"{2 * number}",
            "ch_list": ["H_1", "C_1"],
        }

    problems = [problem(name, number) for name, count in (("Sums", 6), ("Odd", 5)) for number in range(1, count + 1)]
    parts = {
        "problems": {each["identifier"]: each for each in problems},
        "hints": {"H_1": {"_text": "Think of pairs."}},
        "concepts": {"C_1": {"_text": "x+x=2x."}},
    }
    path = tmp_path / "v0.json"
    path.write_text(json.dumps(parts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("raw", "clean"), ANSWERS.items())
def test_answers_lose_the_words_around_them(raw, clean):
    assert champ.clean_answer(raw) == clean
    assert verify(f"it is \\boxed{{{clean}}}", f"\\boxed{{{clean}}}")


def test_every_fifth_problem_of_a_category_is_a_test_problem(file):
    splits = {split: set(champ.load_champ(file, split)["identifier"]) for split in champ.SPLITS}
    assert (
        splits["test"] == {"P_Sums_5", "P_Odd_5"} and len(splits["train"]) == 9 and not splits["train"] & splits["test"]
    )


def test_the_command_line_reads_it_with_its_further_texts(file):
    row = load_rows(DataArguments(dataset_name=file, dataset_format="champ"), "train")[0]
    assert row["prompt"] == [{"role": "user", "content": "What is 1+1?"}]
    assert row["solution"] == "Double it.\nSo it is 2.\n\\boxed{2}" and not is_missing(row["solution"])
    assert row["hints"] == ["Think of pairs."] and row["concepts"] == ["x+x=2x."] and row["category"] == "Sums"


def test_what_cannot_be_read_is_named(file, monkeypatch):
    with pytest.raises(ValueError, match="split='validation' is not one of train, test"):
        champ.load_champ(file, "validation")
    with pytest.raises(ValueError, match=r"nowhere\.json.*no such file"):
        load_rows(DataArguments(dataset_name="nowhere.json", dataset_format="champ"), "train")
    monkeypatch.setattr(champ, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps champ-dataset"):
        load_rows(DataArguments(dataset_name="champ"), "train")
