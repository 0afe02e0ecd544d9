# SPDX-License-Identifier: Apache-2.0
"""From the columns datasets have to `prompt` and `solution`: plain functions of a row, for `dataset.map`.

dataset = dataset.map(from_gsm8k, remove_columns=dataset.column_names)
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from .texts import fill_template, rewrite_last_turn, without_blocks

Row = Mapping[str, Any]

# Short problem statements of DAPO's rows are wrapped in these words, which ask for another answer format than \boxed.
_DAPO_PROBLEM = re.compile(
    r"\ASolve the following math problem step by step\..*?\n\n(.*?)(?:\n\nRemember to put your answer .*)?\Z", re.DOTALL
)


def from_problem(row: Row, problem: str = "problem", solution: str = "solution") -> dict[str, Any]:
    """Two text columns, by default `problem` and `solution`; a number as a solution is boxed."""
    answer = row[solution]
    return make_row(row[problem], answer if isinstance(answer, str) else boxed(answer))


def from_messages(row: Row) -> dict[str, Any]:
    """`messages`: the last turn, the assistant's, is the solution, what stands before it the prompt.

    Raises:
        ValueError: the last turn is not the assistant's, or stands alone.
    """
    *prompt, last = row["messages"]
    if not prompt or last["role"] != "assistant":
        raise ValueError(
            f"`messages` has {len(prompt) + 1} turns and ends with {last['role']!r}; the teacher needs an assistant's "
            "turn behind a user's."
        )
    return {
        "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in prompt],
        "solution": last["content"],
    }


def from_gsm8k(row: Row) -> dict[str, Any]:
    """`question` and `answer`, whose last line is `#### 42`: calculator marks go, the last line is boxed."""
    steps, _, answer = row["answer"].partition("####")
    lines = [without_blocks(line, "<<", ">>") for line in steps.split("\n")]
    solution = "\n".join(lines).strip()
    return make_row(row["question"], f"{solution}\n{boxed(answer.strip().replace(',', ''))}")


def from_openthoughts(row: Row) -> dict[str, Any]:
    """`conversations` of `from` and `value`: thoughts between marks are left out, the marked solution is kept.

    Raises:
        ValueError: there is no user's turn, or no assistant's.
    """
    turns = {turn["from"]: turn["value"] for turn in row["conversations"]}
    problem = turns.get("user", turns.get("human"))
    answer = turns.get("assistant", turns.get("gpt"))
    if problem is None or answer is None:
        raise ValueError(f"`conversations` has turns from {sorted(turns)}; a user and an assistant are needed.")
    marked = re.search(r"<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>|\Z)", answer, re.DOTALL)
    if marked is None:
        return make_row(problem, re.sub(r"\A\s*<think>.*?</think>\s*", "", answer, flags=re.DOTALL))
    return make_row(problem, marked.group(1).strip())


def from_dapo(row: Row) -> dict[str, Any]:
    """`prompt`, a conversation, and `reward_model`, whose `ground_truth` is an answer alone: the teacher reads no steps."""
    *before, last = row["prompt"]
    wrapped = _DAPO_PROBLEM.match(last["content"])
    problem = wrapped.group(1) if wrapped else last["content"]
    return {
        "prompt": [*before, {"role": last["role"], "content": problem}],
        "solution": boxed(row["reward_model"]["ground_truth"]),
    }


FORMATS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "problem": from_problem,
    "messages": from_messages,
    "gsm8k": from_gsm8k,
    "openthoughts": from_openthoughts,
    "dapo": from_dapo,
}


def make_row(problem: str, solution: str) -> dict[str, Any]:
    """A row of a user's message and its reference solution."""
    return {"prompt": [{"role": "user", "content": problem}], "solution": solution}


def boxed(answer: Any) -> str:
    """An answer as a completion gives it, so that it can be verified."""
    return f"\\boxed{{{answer}}}"


def rewrite_prompt(row: Row, template: str) -> dict[str, Any]:
    """The row with its last user message put into `template`, as `prompt_template` does it."""
    return {"prompt": rewrite_last_turn(row["prompt"], lambda text: fill_template(template, prompt=text))}
