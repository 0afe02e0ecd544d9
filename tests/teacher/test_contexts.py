# SPDX-License-Identifier: Apache-2.0
"""What the teacher reads: templates filled in one pass, the last turn rewritten, prompts checked by row."""

import pytest

from trl_opsd.methods.opsd import privileged_contexts
from trl_opsd.rows.texts import check_prompt, check_template, fill_template, message_text, rewrite_last_turn
from trl_opsd.teacher.contexts import (
    REFERENCE_PROMPT_TEMPLATE,
    TEACHER_PROMPT_TEMPLATE,
    Rollout,
    TeacherContext,
    Unused,
    views_text,
)

USER = {"role": "user", "content": "2+3=?"}


@pytest.mark.parametrize(
    ("prompt", "solution"),
    [
        ("What is {solution}?", "it is {prompt}"),
        ("{prompt}", "{solution}{prompt}"),
        ("f(x) = {x}", "\\boxed{5}"),
        ("{{prompt}}", "\\frac{1}{2}"),
        ("\\1 \\g<0>", "%s {} {0} $x$ \\n"),
    ],
)
def test_texts_in_the_slots_are_data(prompt, solution):
    assert fill_template("<{prompt}|{solution}>", prompt=prompt, solution=solution) == f"<{prompt}|{solution}>"


def test_every_place_of_a_slot_is_filled_and_other_braces_stay():
    filled = fill_template("{solution} {other} {solution} \\boxed{}", solution="s")
    assert filled == "s {other} s \\boxed{}"


@pytest.mark.parametrize("template", [TEACHER_PROMPT_TEMPLATE, REFERENCE_PROMPT_TEMPLATE])
def test_the_default_templates_show_what_they_promise(template):
    text = fill_template(template, prompt="PROBLEM", solution="REFERENCE")
    assert text.count("REFERENCE") == 1
    assert text.count("PROBLEM") == (1 if template is TEACHER_PROMPT_TEMPLATE else 0)
    assert text.endswith("\\boxed{}.")


def test_the_last_turn_is_rewritten_and_the_others_stay():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1=?"},
        {"role": "assistant", "content": "2"},
        USER,
    ]
    before = [dict(message) for message in prompt]
    rewritten = rewrite_last_turn(prompt, lambda text: f"<{text}>")
    assert rewritten == [*before[:3], {"role": "user", "content": "<2+3=?>"}]
    assert prompt == before


def test_other_keys_of_the_last_message_stay():
    assert rewrite_last_turn([{**USER, "name": "Ada"}], str.upper) == [{**USER, "name": "Ada"}]


def test_a_plain_prompt_is_rewritten_as_a_whole():
    assert rewrite_last_turn("2+3=?", lambda text: f"<{text}>") == "<2+3=?>"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2+3"}, {"type": "text", "text": "=?"}]
    prompt = [{"role": "user", "content": parts}]
    check_prompt(prompt, "row")
    assert rewrite_last_turn(prompt, lambda text: f"<{text}>")[-1]["content"] == "<2+3=?>"


@pytest.mark.parametrize("content", [None, "", "  \n", [], [{"type": "text", "text": " "}], 5, {"text": "x"}])
def test_a_message_without_text_is_refused(content):
    with pytest.raises(ValueError, match="row 3: the last message's content is not text"):
        message_text({"role": "user", "content": content}, "row 3")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "`prompt` is empty"),
        (" \n", "`prompt` is empty"),
        (None, "`prompt` is NoneType"),
        (7, "`prompt` is int"),
        ([], "`prompt` is list"),
        (["2+3=?"], "`prompt` is list"),
        ({"role": "user", "content": "x"}, "`prompt` is dict"),
        ([{"role": "system", "content": "x"}], "ends with a 'system' turn"),
        ([USER, {"role": "assistant", "content": "5"}], "ends with a 'assistant' turn"),
        ([{"content": "x"}], "ends with a None turn"),
        ([{"role": "user", "content": ""}], "not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Images are not carried"),
        ([{"role": "user", "content": [{"type": "image"}]}, USER], "Images are not carried"),
        ([{"role": "system", "content": ["x"]}, USER], "a part that is not text"),
    ],
)
def test_a_prompt_the_teacher_cannot_be_shown_is_refused_by_row(prompt, told):
    with pytest.raises(ValueError) as raised:
        check_prompt(prompt, "train_dataset row 4")
    assert str(raised.value).startswith("train_dataset row 4: ") and told in str(raised.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "2+3=?",
        [USER],
        [{"role": "system", "content": "s"}, USER],
        [USER, {"role": "assistant", "content": None, "tool_calls": []}, USER],
        [{"role": "system", "content": [{"type": "text", "text": "s"}]}, USER],
    ],
)
def test_text_and_conversations_pass(prompt):
    check_prompt(prompt, "row")


@pytest.mark.parametrize("template", [None, 3, "", "{prompt}", "{ solution }"])
def test_a_template_without_its_slot_is_refused_by_field(template):
    with pytest.raises(ValueError, match=r"teacher_prompt_template.*\{solution\}"):
        check_template("teacher_prompt_template", template, "{solution}")


def test_opsd_gives_each_rollout_its_own_reference_as_the_anchor():
    group = [Rollout("p", "first", "c"), Rollout("p", "second", "d", reward=1.0)]
    assert privileged_contexts(group, None, None) == [
        (TeacherContext("teacher", "first", anchor=1.0, direction=0.0),),
        (TeacherContext("teacher", "second", anchor=1.0, direction=0.0),),
    ]


def test_views_are_told_in_a_few_words():
    skills = [TeacherContext("skill", None, texts=(("skill", text),), read=0.5) for text in "ab"]
    assert views_text((TeacherContext("plain", None, anchor=1.0), *skills)) == "plain, 2 x skill"
    assert views_text(Unused("no right peer")) == "no right peer" and views_text(()) == ""
