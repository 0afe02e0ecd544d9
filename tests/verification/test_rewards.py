# SPDX-License-Identifier: Apache-2.0
"""Answers are verified by math-verify, and nothing a model may write stops a run."""

import asyncio
import functools
import inspect
import threading
from collections import Counter

import pytest
from torch import nn

from trl_opsd.rewards import accuracy_reward, guard_rewards, no_reward, skip_errors
from trl_opsd.verification import verifies, verify

SOLUTION = "2 and 3 make \\boxed{5}"


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


def test_outside_the_main_thread_answers_are_the_same():
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


def fragile(completions, prompts, answers, log_extra=None, scale=1.0, **columns):
    """Logs a column, then trips over an answer that is no number."""
    if log_extra is not None:
        log_extra("length", [len(text) for text in completions])
    return [scale * float(answer) for answer in answers]


async def fragile_async(**columns):
    await asyncio.sleep(0)
    return fragile(**columns)


class Fragile:
    def __call__(self, **columns):
        return fragile(**columns)


class AsyncFragile:
    async def __call__(self, **columns):
        return await fragile_async(**columns)


FORMS = {
    "function": (fragile, "fragile"),
    "async": (fragile_async, "fragile_async"),
    "partial": (functools.partial(fragile, scale=1.0), "fragile"),
    "object": (Fragile(), "Fragile"),
    "async-object": (AsyncFragile(), "AsyncFragile"),
}


def call(reward, answers, **more):
    size = len(answers)
    prompts, completions = [f"p{i}" for i in range(size)], [f"c{i}" for i in range(size)]
    result = reward(prompts=prompts, completions=completions, answers=answers, **more)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


@pytest.mark.parametrize("form", FORMS)
def test_a_guarded_reward_keeps_its_name_its_kind_and_its_values(form):
    reward, name = FORMS[form]
    guarded = guard_rewards(reward, Counter())
    assert guarded.__name__ == name and inspect.iscoroutinefunction(guarded) == ("async" in form)
    assert call(guarded, ["1", "2.5"]) == [1.0, 2.5]


@pytest.mark.parametrize("form", FORMS)
def test_a_reward_that_raises_is_named_with_the_first_row_that_raises(form):
    guarded = guard_rewards(FORMS[form][0], Counter())
    with pytest.raises(ValueError, match="could not convert") as raised:
        call(guarded, ["1", "x", "y"])
    (note,) = raised.value.__notes__
    for text in (FORMS[form][1], "on row 1", "'p1'", "'c1'", "skip_errors(function)"):
        assert text in note


@pytest.mark.parametrize("form", FORMS)
def test_skipped_rows_have_no_reward_and_are_counted_and_told(form):
    reward, name = FORMS[form]
    errors = Counter()
    guarded = guard_rewards(skip_errors(reward), errors)
    told = rf"'{name}' raised ValueError.* on row 1 .*2 of 4 rows.*rewards/{name}/errors"
    with pytest.warns(UserWarning, match=told):
        assert call(guarded, ["1", "x", "3", None]) == [1.0, None, 3.0, None]
    assert errors == {name: 2}


def test_a_skipped_row_leaves_what_the_others_log_in_its_place():
    logged, metrics = {}, []

    def reward(completions, answers, log_extra, log_metric, **columns):
        values = [float(answer) for answer in answers]
        log_metric("mean", sum(values) / len(values))
        log_extra("answer", values)
        log_extra("text", completions)
        return values

    def log_extra(name, values):
        logged.setdefault(name, []).extend(values)

    guarded = guard_rewards(skip_errors(reward), Counter())
    with pytest.warns(UserWarning, match="row 0"):
        call(guarded, ["x", "2", "y", "4"], log_extra=log_extra, log_metric=lambda *pair: metrics.append(pair))
    assert logged == {"answer": [None, 2.0, None, 4.0], "text": [None, "c1", None, "c3"]}
    assert metrics == [("mean", 2.0), ("mean", 4.0)]


def test_a_reward_that_raises_on_a_batch_but_on_no_row_says_so_or_is_taken_row_by_row():
    def reward(completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("one at a time")
        return [7.0]

    with pytest.raises(RuntimeError, match="one at a time") as raised:
        call(guard_rewards(reward, Counter()), ["1", "2"])
    assert "on no row alone" in raised.value.__notes__[0]
    errors = Counter()
    assert call(guard_rewards(skip_errors(reward), errors), ["1", "2"]) == [7.0, 7.0] and not errors


def test_reward_models_and_their_names_are_not_wrapped():
    model = nn.Linear(1, 1)
    wrapped = guard_rewards([model, "org/model", fragile], Counter())
    assert wrapped[:2] == [model, "org/model"] and wrapped[2].__wrapped__ is fragile


def test_an_interrupt_is_no_error_of_a_row():
    def reward(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(guard_rewards(skip_errors(reward), Counter()), ["1"])
