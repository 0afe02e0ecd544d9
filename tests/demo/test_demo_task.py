# SPDX-License-Identifier: Apache-2.0
"""The demo's task and the attempts its model reads."""

import random
import re
from collections import Counter

import pytest

from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE, build_dataset, build_rows
from trl_opsd.demo.corpus import PLAIN, WITH_REFERENCE, draw_example, write_attempt, write_until
from trl_opsd.demo.task import SPLITS, draw_problem, draw_problem_of, split_of, stays_in_range
from trl_opsd.verification import verifies, verify


def test_rows_are_a_function_of_split_and_seed():
    assert build_rows("train", 50, seed=3) == build_rows("train", 50, seed=3)
    assert build_rows("train", 50, seed=3) == build_rows("train", 80, seed=3)[:50]
    assert build_rows("train", 50, seed=3) != build_rows("train", 50, seed=4)


def test_no_question_stands_in_two_splits_or_twice_in_one():
    questions = {split: [row["prompt"][0]["content"] for row in build_rows(split, 600)] for split in SPLITS}
    seen = Counter(question for rows in questions.values() for question in rows)
    assert set(seen.values()) == {1}
    assert all(split_of(question) == split for split, rows in questions.items() for question in rows)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev'.*validation"):
        build_rows("dev", 1)


def test_dataset_has_the_columns_of_the_trainers():
    dataset = build_dataset("validation", 5)
    assert dataset.column_names == ["prompt", "solution"]
    assert dataset[0]["prompt"][0]["role"] == "user"


def test_every_step_of_a_solution_is_true_and_its_answer_is_the_questions():
    generator = random.Random(0)
    for _ in range(300):
        problem = draw_problem(generator)
        assert stays_in_range(problem.start, problem.operations)
        assert eval(problem.question.removesuffix("=?")) == problem.answer
        *steps, boxed = problem.solution.split("\n")
        assert boxed == f"\\boxed{{{problem.answer}}}"
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in steps))


def test_math_verify_accepts_the_answer_and_nothing_else():
    for row in build_rows("validation", 60):
        solution = row["solution"]
        answer = int(re.search(r"boxed\{(\d+)\}", solution).group(1))
        assert verifies(solution)
        assert verify(solution, solution)
        assert verify(f"<think>1+1=2\n</think>\n\\boxed{{{answer}}}", solution)
        assert not verify(f"{solution[: solution.index(chr(92))]}\\boxed{{{answer + 1}}}", solution)


def test_the_habit_slips_as_often_as_it_says():
    generator = random.Random(1)
    problems = [draw_problem(generator) for _ in range(3000)]
    attempts = [write_attempt(problem, PLAIN, generator) for problem in problems]
    missed = sum(len(attempt.misses) for attempt in attempts) / sum(len(problem.operations) for problem in problems)
    assert missed == pytest.approx(PLAIN.slip_rate * (1 - PLAIN.notice_rate), abs=0.03)
    assert all(trained for attempt in attempts for _, trained in attempt.pieces)


def test_with_a_reference_no_slip_is_trained_on():
    generator = random.Random(2)
    for _ in range(300):
        problem = draw_problem_of("pretraining", generator)
        attempt = write_attempt(problem, WITH_REFERENCE, generator)
        text = "".join(piece if trained else "~" for piece, trained in attempt.pieces)
        steps = re.findall(r"(\d+[-+*]\d+)=(\d+)\n", text)
        assert all(eval(left) == int(right) for left, right in steps)
        assert "~" in text or verify(attempt.text, problem.solution)


def test_attempts_can_be_asked_for_by_outcome():
    generator = random.Random(3)
    problem = draw_problem(generator)
    assert write_until(problem, PLAIN, generator, correct=False, marker=False).value != problem.answer
    peer = write_until(problem, PLAIN, generator, correct=True, marker=True)
    assert peer.value == problem.answer and "wait" in peer.text


def test_the_corpus_holds_every_prompt_and_no_problem_of_another_split():
    generator = random.Random(4)
    examples = [draw_example(generator) for _ in range(400)]
    reference = sum("[reference]" in example.user for example in examples)
    alone = sum(example.user.startswith("[reference]") for example in examples)
    assert 0 < alone < reference < len(examples)
    assert {example.thinking for example in examples} == {True, False}
    questions = [line for example in examples for line in example.user.split("\n") if line.endswith("=?")]
    assert {split_of(question) for question in questions} == {"pretraining"}


def test_the_reference_only_template_is_the_teachers_without_the_problem():
    assert TEACHER_PROMPT_TEMPLATE.replace("{prompt}\n", "") == REFERENCE_ONLY_TEMPLATE


def test_longer_chains_are_as_long_as_asked_and_keep_their_splits():
    rows = build_rows("test", 40, num_operations=(8, 9, 10))
    assert {row["solution"].count("\n") for row in rows} == {8, 9, 10}
    assert {split_of(row["prompt"][0]["content"]) for row in rows} == {"test"}
    example = draw_example(random.Random(0), {"stranger": 1}, (8,))
    assert example.user.count("\n") == 3 + 8  # problem, both marks, and eight steps with their answer
