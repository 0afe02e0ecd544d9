# SPDX-License-Identifier: Apache-2.0
"""Slots of templates, lines that are left out, texts of columns, and first steps of solutions."""

import time

import pytest

from trl_opsd.rows.solution_steps import first_steps
from trl_opsd.rows.texts import column_text, slots_of, without_empty_lines


@pytest.mark.parametrize(
    "template, slots",
    [
        ("{prompt} {solution}\n{prompt}", ("prompt", "solution")),
        ("Hint: {hint_1}", ("hint_1",)),
        ("\\boxed{answer} \\frac{a}{b} \\sqrt[3]{x} x^{n} x_{n} \\text*{y}", ()),
        ("\\boxed{{answer}}", ("answer",)),
        ("\\alpha {hint}", ("hint",)),
        ("a{2} {} { hint } {a-b}", ()),
        ("{größe}", ("größe",)),
    ],
)
def test_slots_are_names_in_braces_that_are_no_latex(template, slots):
    assert slots_of(template) == slots


@pytest.mark.parametrize(
    "template, empty, wanted",
    [
        ("a\n{x}\nb", ["x"], "a\nb"),
        ("a\n\nX: {x}\n\nb", ["x"], "a\n\nb"),
        ("a\n\nX: {x}\nY: {y}\n\nb", ["x", "y"], "a\n\nb"),
        ("a\n\nX: {x}\n\nY: {y}\n\nb", ["x", "y"], "a\n\nb"),
        ("a\n\nX: {x}\nY: {y}\n\nb", ["x"], "a\n\nY: {y}\n\nb"),
        ("{x}\n\nb", ["x"], "b"),
        ("a\n\nX: {x}", ["x"], "a"),
        ("a {x} {y}\nb", ["x"], "a {x} {y}\nb"),
        ("a\n\n\nb\n", ["x"], "a\n\n\nb\n"),
        ("a\n\n\n\nb", [], "a\n\n\n\nb"),
    ],
)
def test_a_line_goes_where_all_its_slots_are_empty(template, empty, wanted):
    assert without_empty_lines(template, empty) == wanted


@pytest.mark.parametrize(
    "value, text",
    [("a", "a"), (["a", "b"], "a\nb"), (("a",), "a"), (None, None), (" ", None), ([], None), (["", " "], None)],
)
def test_a_column_is_text_lines_or_nothing(value, text):
    assert column_text(value, "x") == text


@pytest.mark.parametrize("value", [3, ["a", None], {"a": "b"}, "\ud800"])
def test_what_is_no_text_is_refused_with_its_place(value):
    with pytest.raises(ValueError, match=r"^here is "):
        column_text(value, "here")


LINES = "First a.\n\n  Then b. And c.\n\t\nSo d.\n"


@pytest.mark.parametrize(
    "solution, share, wanted",
    [
        (LINES, 1.0, LINES),
        (LINES, 0.999, "First a.\n\n  Then b. And c.\n\t\nSo d."),
        (LINES, 2 / 3, "First a.\n\n  Then b. And c."),
        (LINES, 0.34, "First a.\n\n  Then b. And c."),
        (LINES, 1 / 3, "First a."),
        (LINES, 0.01, "First a."),
        ("x\n" * 100, 0.07, "x\n" * 6 + "x"),  # 0.07 * 100 is a little above 7
        ("It is 3.5. Is it? Yes! Done", 0.5, "It is 3.5. Is it?"),
        ("It is 3.5. Is it? Yes! Done", 0.75, "It is 3.5. Is it? Yes!"),
        ("一步。兩步。三步。", 0.3, "一步。"),
        ("one word", 0.1, "one word"),
        (" \n ", 0.5, " \n "),
        ("", 0.5, ""),
        (None, 0.5, None),
    ],
)
def test_the_first_steps_are_a_beginning_of_the_solution(solution, share, wanted):
    assert first_steps(solution, share) == wanted


@pytest.mark.parametrize("text", [" " * 200_000 + "a", "a" * 200_000, ". " * 100_000, "\n" * 200_000, "x\n" * 100_000])
def test_long_solutions_are_cut_in_linear_time(text):
    started = time.perf_counter()
    first_steps(text, 0.5)
    assert time.perf_counter() - started < 2
