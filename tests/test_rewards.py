# SPDX-License-Identifier: Apache-2.0
"""Answers are verified by math-verify, and nothing a model may write stops a run."""

import threading

import pytest

from trl_opsd import verification
from trl_opsd.rewards import accuracy_reward, no_reward
from trl_opsd.verification import parse_answer, verifies, verify

SOLUTION = "2 and 3 make \\boxed{5}"


@pytest.fixture(autouse=True)
def fresh_caches():
    yield
    verify.cache_clear()
    parse_answer.cache_clear()


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        ("so \\boxed{5}", SOLUTION, 1.0),
        ("so \\boxed{5.0}", SOLUTION, 1.0),
        ("so \\boxed{\\frac{10}{2}}", SOLUTION, 1.0),
        ("so \\boxed{6}", SOLUTION, 0.0),
        ("no idea", SOLUTION, 0.0),
        ("", SOLUTION, 0.0),
        (None, SOLUTION, 0.0),
        ("so \\boxed{5}", "a proof without a number", None),
        ("so \\boxed{5}", "", None),
        ("so \\boxed{5}", None, None),
        ("$x^2+2x+1$", "$(x+1)^2$", 1.0),
    ],
)
def test_right_is_one_wrong_is_zero_and_an_unreadable_reference_none(completion, solution, reward):
    forms = [[{"role": "assistant", "content": completion}]] + ([completion] if completion is not None else [])
    for form in forms:
        assert accuracy_reward(completions=[form], solution=[solution], prompts=["p"], extra=[1]) == [reward]


def test_rewards_stand_in_the_order_of_the_completions():
    completions = ["\\boxed{5}", "\\boxed{4}", "\\boxed{5}"]
    assert accuracy_reward(completions, [SOLUTION, SOLUTION, None]) == [1.0, 0.0, None]


def test_the_last_message_of_a_conversation_is_verified():
    conversation = [
        {"role": "assistant", "content": "\\boxed{4}"},
        {"role": "assistant", "content": "\\boxed{5}"},
    ]
    assert accuracy_reward([conversation], [SOLUTION]) == [1.0]


def test_unequal_numbers_of_completions_and_solutions_are_our_callers_error():
    with pytest.raises(ValueError):
        accuracy_reward(["\\boxed{5}"], [SOLUTION, SOLUTION])


def test_a_run_without_answers_gets_zeros():
    assert no_reward(["a", "b"], prompts=[], solution=[None, None]) == [0.0, 0.0]


WEIRD = {
    "nul": "\x00",
    "nul-in-box": "\\boxed{\x00}",
    "lone-surrogate": "\ud800 \\boxed{5",
    "open-braces": "\\boxed{" * 500,
    "parentheses": "(" * 2000 + "5" + ")" * 2000,
    "digits": "7" * 20_000,
    "dollars": "$$" * 1000,
    "roots": "\\sqrt" * 500,
    "division-by-zero": "\\boxed{\\frac{1}{0}}",
    "empty-text": "\\boxed{\\text{}}",
    "infinity": "\\boxed{\\infty}",
    "blank": " \n\t",
}


@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_odd_text_on_either_side_gives_false_and_never_an_error(text):
    assert verify(text, SOLUTION) is False
    assert verify(SOLUTION, text) is False
    assert verifies(text) in (True, False)


# The alarm may go off inside a destructor, where Python can only warn.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nested_braces_and_towers_of_powers_stop_at_the_time_limit(monkeypatch):
    monkeypatch.setattr(verification, "_PARSING_SECONDS", 1)
    monkeypatch.setattr(verification, "_COMPARING_SECONDS", 1)
    assert verify("\\boxed{" + "{" * 3000 + "5" + "}" * 3000 + "}", SOLUTION) is False
    assert verify("\\boxed{9^{9^{9^9}}}", SOLUTION) is False


def test_outside_the_main_thread_no_alarm_is_set_and_answers_are_the_same():
    results, errors = [], []

    def work():
        try:
            results.extend(accuracy_reward(["\\boxed{5}", "\\boxed{4}", "\x00"], [SOLUTION] * 3))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not errors and results == [1.0, 0.0, 0.0]


def test_a_parser_that_raises_found_no_answer(monkeypatch):
    import math_verify

    def fail(*args, **kwargs):
        raise RecursionError

    with monkeypatch.context() as patch:
        patch.setattr(math_verify, "verify", fail)
        assert verify("\\boxed{5}", SOLUTION) is False
    parse_answer.cache_clear()
    monkeypatch.setattr(math_verify, "parse", fail)
    assert parse_answer("\\boxed{5}") == () and not verifies("\\boxed{5}")
