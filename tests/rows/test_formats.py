# SPDX-License-Identifier: Apache-2.0
"""Rows as datasets have them become `prompt` and `solution`, and the solutions verify."""

import json

import pytest

from trl_opsd.commands.train import DataArguments, load_rows
from trl_opsd.rows.formats import (
    FORMATS,
    from_dapo,
    from_gsm8k,
    from_messages,
    from_openthoughts,
    from_problem,
    rewrite_prompt,
)
from trl_opsd.verification import verify


def asked(text):
    return [{"role": "user", "content": text}]


def test_problem_and_solution_keep_their_text_and_box_a_number():
    assert from_problem({"problem": "1+1?", "solution": "so 2"}) == {"prompt": asked("1+1?"), "solution": "so 2"}
    assert from_problem({"q": "1+1?", "a": 2}, problem="q", solution="a")["solution"] == "\\boxed{2}"


def test_the_last_message_is_the_solution_and_the_others_the_prompt():
    turns = [("system", "be brief"), ("user", "1+1?"), ("assistant", "2")]
    row = from_messages({"messages": [{"role": role, "content": text, "id": 7} for role, text in turns]})
    assert row == {"prompt": [{"role": "system", "content": "be brief"}, *asked("1+1?")], "solution": "2"}
    with pytest.raises(ValueError, match="1 turns and ends with 'user'"):
        from_messages({"messages": asked("1+1?")})
    with pytest.raises(ValueError, match="2 turns and ends with 'user'"):
        from_messages({"messages": asked("1+1?") * 2})


def test_gsm8k_loses_its_calculator_marks_and_gets_its_answer_boxed():
    row = from_gsm8k({"question": "q", "answer": "He has 48/2 = <<48/2=24>>24 clips.\nIn all 1,072.\n#### 1,072"})
    assert row["solution"] == "He has 48/2 = 24 clips.\nIn all 1,072.\n\\boxed{1072}"
    assert verify("I get \\boxed{1072}", row["solution"])


@pytest.mark.parametrize(
    "answer",
    [
        "<|begin_of_thought|>\nhm 5? no \\boxed{5}\n<|end_of_thought|>\n\n<|begin_of_solution|>\nIt is \\boxed{4}.\n<|end_of_solution|>",
        "<think>\nhm 5? \\boxed{5}\n</think>\n\nIt is \\boxed{4}.",
        "It is \\boxed{4}.",
    ],
)
def test_openthoughts_keeps_the_solution_and_leaves_the_thoughts(answer):
    conversations = [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": answer}]
    assert from_openthoughts({"system": "s", "conversations": conversations}) == {
        "prompt": asked("2+2?"),
        "solution": "It is \\boxed{4}.",
    }


def test_openthoughts_without_an_answer_is_refused():
    with pytest.raises(ValueError, match=r"turns from \['user'\]"):
        from_openthoughts({"conversations": [{"from": "user", "value": "2+2?"}]})


def test_dapo_is_unwrapped_and_its_answer_boxed():
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        '$Answer (without quotes).\n\nFind x.\n\nGiven x=3.\n\nRemember to put your answer on its own line after "Answer:".'
    )
    row = {"prompt": asked(wrapped), "reward_model": {"ground_truth": "34", "style": "rule"}, "data_source": "dapo"}
    assert from_dapo(row) == {"prompt": asked("Find x.\n\nGiven x=3."), "solution": "\\boxed{34}"}
    plain = {"prompt": asked("Find x."), "reward_model": {"ground_truth": "34"}}
    assert from_dapo(plain)["prompt"] == asked("Find x.")


def test_a_format_named_in_the_arguments_is_applied_and_others_are_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "q", "answer": "a\n#### 3"}) + "\n")
    rows = load_rows(DataArguments(dataset_name=str(data), dataset_format="gsm8k"), "train")
    assert rows.column_names == ["prompt", "solution"] and rows[0] == {
        "prompt": asked("q"),
        "solution": "a\n\\boxed{3}",
    }
    with pytest.raises(ValueError, match=f"dataset_format='gsm' is not one of {', '.join(FORMATS)}, champ"):
        load_rows(DataArguments(dataset_name=str(data), dataset_format="gsm"), "train")


def test_a_prompt_is_put_into_a_template():
    row = {"prompt": asked("{x}"), "solution": "s"}
    assert rewrite_prompt(row, "{prompt} Box {}.")["prompt"] == asked("{x} Box {}.")
