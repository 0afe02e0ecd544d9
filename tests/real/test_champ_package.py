# SPDX-License-Identifier: Apache-2.0
"""The problems of the package champ-dataset: all are read, and every answer verifies against itself."""

from importlib.util import find_spec

import pytest

from trl_opsd.rows.champ import load_champ
from trl_opsd.rows.texts import is_missing
from trl_opsd.verification import start_verifying
from trl_opsd.verification.answers import last_box
from trl_opsd.verification.golds import why_no_mathematics

pytestmark = pytest.mark.skipif(
    find_spec("champ_dataset") is None,
    reason="champ-dataset is not installed: `pip install --no-deps champ-dataset==1.0.0`",
)


@pytest.fixture(scope="module")
def problems():
    return [row for split in ("train", "test") for row in load_champ("champ", split)]


def test_the_split_is_fixed(problems):
    assert (len(load_champ("champ", "train")), len(load_champ("champ", "test"))) == (216, 54)
    assert len({row["identifier"] for row in problems}) == 270


def test_every_problem_has_steps_and_some_help(problems):
    assert not [row["identifier"] for row in problems if is_missing(row["solution"]) or row["solution"].count("\n") < 1]
    assert sum(bool(row["hints"]) for row in problems) >= 200
    assert sum(bool(row["concepts"]) for row in problems) >= 100


def test_every_answer_verifies_against_itself_and_none_is_read_as_a_product_of_letters(problems):
    answers = [f"\\boxed{{{last_box(row['solution'])}}}" for row in problems]
    verdicts = start_verifying([(answer, row["solution"]) for answer, row in zip(answers, problems, strict=True)])()
    assert all(verdict.is_right for verdict in verdicts)
    assert not [verdict.answer for verdict in verdicts if "E*" in str(verdict.answer)]
    assert not [answer for answer in answers if why_no_mathematics(answer)]


def test_other_answers_are_told_apart(problems):
    """Of all pairs of different answers two are taken for equal: `f(x)=0` and `x=y=0` for `0`."""
    answers = sorted({f"\\boxed{{{last_box(row['solution'])}}}" for row in problems})
    pairs = [(one, other) for one in answers for other in answers if one < other]
    equal = [pair for pair, verdict in zip(pairs, start_verifying(pairs)(), strict=True) if verdict.is_right]
    assert len(pairs) > 9000 and len(equal) <= 2, equal
