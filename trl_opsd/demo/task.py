# SPDX-License-Identifier: Apache-2.0
"""Written-out arithmetic: the task of the embedded demo model.

A question is a chain of two to four operations on small numbers, `((3+4)-2)*2=?`; its solution writes one
step a line and boxes the answer, `3+4=7\n7-2=5\n5*2=10\n\\boxed{10}`. Every draw is a function of its seed,
and a question belongs to one split for ever, because the split is a hash of its text. Longer chains are harder: each step
is a further chance to slip.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LARGEST_VALUE = 40
LARGEST_OPERAND = 9
FACTORS = (2, 3)
NUM_OPERATIONS = (2, 3, 3, 4)  # drawn from uniformly
HARD_NUM_OPERATIONS = (8, 9, 10)  # of the base on which a group of rollouts is mostly all wrong

# Upper ends of each split's share of the hash space, in percent.
SPLITS = {"pretraining": 70, "train": 85, "validation": 92, "test": 100}


@dataclass(frozen=True)
class Problem:
    """A start value and the operations applied to it, from left to right.

    Attributes:
        start (`int`): first number, 1 to 9.
        operations (`tuple[tuple[str, int], ...]`): pairs of an operator out of `+-*` and its right operand.
    """

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """The text a user writes, for example `(3+4)-2=?`."""
        text = str(self.start)
        for index, (operator, operand) in enumerate(self.operations):
            text = f"({text})" if index else text
            text += f"{operator}{operand}"
        return text + "=?"

    @property
    def answer(self) -> int:
        """The value of the chain."""
        value = self.start
        for operator, operand in self.operations:
            value = apply_operation(value, operator, operand)
        return value

    @property
    def solution(self) -> str:
        """Every step on its line, then the boxed answer."""
        lines, value = [], self.start
        for operator, operand in self.operations:
            result = apply_operation(value, operator, operand)
            lines.append(f"{value}{operator}{operand}={result}")
            value = result
        return "\n".join([*lines, f"\\boxed{{{value}}}"])


def apply_operation(value: int, operator: str, operand: int) -> int:
    """Result of one step."""
    if operator == "+":
        return value + operand
    return value - operand if operator == "-" else value * operand


def stays_in_range(value: int, operations: tuple[tuple[str, int], ...]) -> bool:
    """Whether every value from `value` on through `operations` lies in 0..`LARGEST_VALUE`."""
    for operator, operand in operations:
        if not 0 <= value <= LARGEST_VALUE:
            return False
        value = apply_operation(value, operator, operand)
    return 0 <= value <= LARGEST_VALUE


def draw_problem(generator: random.Random, num_operations: Sequence[int] = NUM_OPERATIONS) -> Problem:
    """Draws one problem of any split, of a length out of `num_operations`."""
    start = generator.randint(1, 9)
    value, operations = start, []
    for _ in range(generator.choice(num_operations)):
        choices = [("+", k) for k in range(1, LARGEST_OPERAND + 1)] + [("-", k) for k in range(1, LARGEST_OPERAND + 1)]
        choices += [("*", k) for k in FACTORS] * 3
        operation = generator.choice([pair for pair in choices if stays_in_range(value, (pair,))])
        value = apply_operation(value, *operation)
        operations.append(operation)
    return Problem(start, tuple(operations))


def split_of(question: str) -> str:
    """Name of the one split that `question` belongs to."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return next(name for name, end in SPLITS.items() if bucket < end)


def draw_problem_of(split: str, generator: random.Random, num_operations: Sequence[int] = NUM_OPERATIONS) -> Problem:
    """Draws problems until one belongs to `split`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}.")
    while True:
        problem = draw_problem(generator, num_operations)
        if split_of(problem.question) == split:
            return problem


def draw_problems(
    split: str, num_problems: int, *, seed: int = 0, num_operations: Sequence[int] = NUM_OPERATIONS
) -> list[Problem]:
    """Distinct problems of one split; a longer list begins with the shorter one."""
    generator = random.Random(f"{split}/{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < num_problems:
        problem = draw_problem_of(split, generator, num_operations)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def build_rows(
    split: str, num_rows: int, *, seed: int = 0, num_operations: Sequence[int] = NUM_OPERATIONS
) -> list[dict[str, Any]]:
    """Distinct problems of one split as rows of a prompt and its reference solution.

    Args:
        split (`str`): `"pretraining"`, `"train"`, `"validation"` or `"test"`.
        num_rows (`int`): number of rows; the smallest split holds several thousand problems.
        seed (`int`): same `split` and `seed`, same rows; a longer list begins with the shorter.
        num_operations (`Sequence[int]`): lengths of the chains, drawn from uniformly.

    Returns:
        `list[dict]`: rows `{"prompt": [{"role": "user", "content": question}], "solution": text}`.
    """
    return [
        {"prompt": [{"role": "user", "content": problem.question}], "solution": problem.solution}
        for problem in draw_problems(split, num_rows, seed=seed, num_operations=num_operations)
    ]


def build_dataset(split: str, num_rows: int, *, seed: int = 0):
    """`build_rows` as a `datasets.Dataset` with the columns `prompt` and `solution`."""
    from datasets import Dataset

    return Dataset.from_list(build_rows(split, num_rows, seed=seed))
