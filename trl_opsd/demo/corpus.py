# SPDX-License-Identifier: Apache-2.0
"""What the demo model reads while it is made: attempts with a bad habit, with and without a reference.

The gap between student and teacher has to be one of elicitation, so the model learns the arithmetic and, in
the plain prompt, a habit on top of it: a result is often a slip, and most slips go unnoticed. With a right
solution in the prompt it is never trained to slip, and always to notice; the slips still stand there, so it
knows how to go on from the student's. A wrong attempt in the same slot misleads it where that one slipped; a
stranger's solution does nothing, which only the last phase (build.py) makes so.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE
from .task import NUM_OPERATIONS, Problem, apply_operation, draw_problem_of, stays_in_range

MARKER = "wait "
SLIP_DISTANCES = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True)
class Habit:
    """How results are written.

    Attributes:
        slip_rate (`float`): share of results that are slips, in [0, 1].
        notice_rate (`float`): share of slips followed by the marker and the step again, in [0, 1].
        trained (`bool`): whether the slip, and going on after it, are trained on or only read.
        doubt_rate (`float`): share of correct results that are followed by the marker and the step again.
    """

    slip_rate: float
    notice_rate: float
    trained: bool
    doubt_rate: float = 0.02


PLAIN = Habit(slip_rate=0.3, notice_rate=0.12, trained=True)
WITH_REFERENCE = Habit(slip_rate=0.3, notice_rate=0.7, trained=False)
REFERENCE_ONLY = Habit(slip_rate=0.3, notice_rate=1.0, trained=True)
CAREFUL_PEER = Habit(slip_rate=0.4, notice_rate=1.0, trained=True)
RETRY_SLIP_RATE = 0.1
FOLLOW_RATE = 0.6  # share of a wrong attempt's slips that its reader repeats

THINKING_SHARE = 0.25
FORMAT_SHARES = {
    "plain": 0.32,
    "solution": 0.24,
    "peer": 0.06,
    "wrong": 0.1,
    "stranger": 0.16,
    "reference_only": 0.12,
}
# What the model reads last: only many strangers teach it that a stranger's solution says nothing about the problem.
LATE_FORMAT_SHARES = {"plain": 144, "solution": 120, "peer": 30, "wrong": 60, "reference_only": 48, "stranger": 268}
LAST_FORMAT_SHARES = {"plain": 96, "solution": 80, "peer": 20, "wrong": 40, "reference_only": 32, "stranger": 402}


@dataclass
class Attempt:
    """A written chain in pieces, each with the mark whether it is trained on."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)
    value: int = 0
    misses: dict[int, tuple[int, int]] = field(default_factory=dict)  # step -> (left operand, slip nobody noticed)

    def add(self, text: str, trained: bool = True) -> None:
        """Appends a piece."""
        self.pieces.append((text, trained))

    @property
    def text(self) -> str:
        """The chain as it reads."""
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Example:
    """One training example: a user turn, the thinking switch and the pieces of the assistant's turn.

    `alike` is a user turn that says as much about the pieces: the problem alone for a stranger's solution.
    """

    user: str
    thinking: bool
    pieces: tuple[tuple[str, bool], ...]
    alike: str


def draw_slip(problem: Problem, step: int, result: int, generator: random.Random) -> int | None:
    """A wrong result near the right one from which the rest of the chain stays in range, or None."""
    rest = problem.operations[step + 1 :]
    slips = [result + distance for distance in SLIP_DISTANCES if stays_in_range(result + distance, rest)]
    return generator.choice(slips) if slips else None


def write_step(attempt: Attempt, problem: Problem, step: int, habit: Habit, generator: random.Random) -> bool:
    """Writes a step's results until the chain goes on with one; returns whether that is a missed slip."""
    operator, operand = problem.operations[step]
    left, result = attempt.value, apply_operation(attempt.value, operator, operand)
    for slip_rate in (habit.slip_rate, RETRY_SLIP_RATE, 0.0):
        slip = draw_slip(problem, step, result, generator) if generator.random() < slip_rate else None
        attempt.value = result if slip is None else slip
        attempt.add(f"{attempt.value}\n", slip is None or habit.trained)
        again = generator.random() < (habit.doubt_rate if slip is None else habit.notice_rate)
        if not again or slip_rate == 0.0:
            break
        attempt.add(MARKER, slip is not None or habit.trained)
        attempt.add(f"{left}{operator}{operand}=")
    if attempt.value == result:
        return False
    attempt.misses[step] = (left, attempt.value)
    return True


def write_attempt(
    problem: Problem,
    habit: Habit,
    generator: random.Random,
    *,
    thinking: bool = False,
    misled_by: Attempt | None = None,
) -> Attempt:
    """Writes one attempt at `problem`, which may go wrong as `habit` says."""
    attempt = Attempt(value=problem.start)
    missed = False
    if thinking:
        attempt.add("<think>")
    for step, (operator, operand) in enumerate(problem.operations):
        attempt.add(str(attempt.value), habit.trained or not missed)
        attempt.add(f"{operator}{operand}=")
        left, slip = misled_by.misses.get(step, (None, 0)) if misled_by else (None, 0)
        if left == attempt.value and generator.random() < FOLLOW_RATE:
            attempt.add(f"{slip}\n")
            attempt.value, missed = slip, False
        else:
            missed = write_step(attempt, problem, step, habit, generator)
    close = "</think>" if thinking else "\\boxed{"
    attempt.add(close, habit.trained or not missed)
    attempt.add(("\n\\boxed{" if thinking else "") + f"{attempt.value}}}")
    return attempt


def write_until(problem: Problem, habit: Habit, generator: random.Random, *, correct: bool, marker: bool) -> Attempt:
    """Writes attempts until one ends as asked."""
    while True:
        attempt = write_attempt(problem, habit, generator)
        if (attempt.value == problem.answer) == correct and (not marker or MARKER in attempt.text):
            return attempt


def draw_example(
    generator: random.Random,
    shares: Mapping[str, float] = FORMAT_SHARES,
    num_operations: Sequence[int] = NUM_OPERATIONS,
) -> Example:
    """Draws one training example of chains of these lengths, its format with probabilities proportional to `shares`."""
    problem = draw_problem_of("pretraining", generator, num_operations)
    form = generator.choices(list(shares), list(shares.values()))[0]
    thinking = generator.random() < THINKING_SHARE
    habit, misled_by, reference = WITH_REFERENCE, None, problem.solution
    if form == "plain":
        return Example(problem.question, thinking, _pieces(problem, PLAIN, generator, thinking), problem.question)
    if form == "stranger":
        habit, reference = PLAIN, draw_problem_of("pretraining", generator, num_operations).solution
    elif form == "wrong":
        misled_by = write_until(problem, PLAIN, generator, correct=False, marker=False)
        reference = misled_by.text
    elif form == "peer" or generator.random() < 0.15:
        reference = write_until(problem, CAREFUL_PEER, generator, correct=True, marker=True).text
    if form == "reference_only":
        user = REFERENCE_ONLY_TEMPLATE.format(solution=reference)
        return Example(user, thinking, _pieces(problem, REFERENCE_ONLY, generator, thinking), user)
    user = TEACHER_PROMPT_TEMPLATE.format(prompt=problem.question, solution=reference)
    alike = problem.question if form == "stranger" else user
    return Example(user, thinking, _pieces(problem, habit, generator, thinking, misled_by), alike)


def _pieces(problem, habit, generator, thinking, misled_by=None):
    return tuple(write_attempt(problem, habit, generator, thinking=thinking, misled_by=misled_by).pieces)
