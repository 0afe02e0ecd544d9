# SPDX-License-Identifier: Apache-2.0
"""Reward functions in TRL's form: those used where the user gives none, and a guard around those the user gives."""

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

from torch import nn

from .verification import Verdict, check_verifier, start_verifying

_RAN_OUT = (
    "Verifying a rollout ran out of time (5 seconds, less where many of a batch do), so it has no reward. The log has the "
    "share of such rollouts as rewards/unscored."
)


def make_accuracy_reward(verifier: str = "math") -> Callable[..., list[float | None]]:
    """A reward function that compares a completion's answer with the reference's.

    Args:
        verifier: `math`, `exact`, `choice` or `module:function`.

    Raises:
        ValueError: there is no such verifier.
    """
    check_verifier(verifier)
    started: list[tuple[list, Callable[[], list[Verdict]]]] = []

    def begin(completions: list, solution: list[str | None]) -> tuple[list, Callable[[], list[Verdict]]]:
        pairs = accuracy_pairs(completions, solution)
        return pairs, start_verifying([pair for pair in pairs if pair is not None], verifier)

    def accuracy_reward(
        completions: list,
        solution: list[str | None],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """1 where a completion's answer equals the reference's, 0 where it does not.

        Args:
            completions: texts, or conversations of one message.
            solution: reference solutions; their last answer counts.
            log_metric: TRL's; gets `rewards/unscored`, the share of completions that ran out of time.
            **kwargs: ignored, TRL passes more columns.

        Returns:
            One reward a completion; None where the reference holds no answer that can be read, or time ran out.
        """
        pairs, wait = started.pop() if started else begin(completions, solution)
        if pairs != accuracy_pairs(completions, solution):  # begun for another batch
            pairs, wait = begin(completions, solution)
        verdicts = iter(wait())
        by_row = [Verdict(None) if pair is None else next(verdicts) for pair in pairs]
        num_unscored = sum(verdict.ran_out for verdict in by_row)
        if num_unscored:
            warnings.warn(_RAN_OUT, stacklevel=2)
        if log_metric is not None and by_row:
            log_metric("rewards/unscored", num_unscored / len(by_row))
        return [None if verdict.is_right is None else float(verdict.is_right) for verdict in by_row]

    # Lets a trainer have a batch verified while it does other work, before it calls the function.
    accuracy_reward.begin = lambda completions, solution: started.append(begin(completions, solution))
    return accuracy_reward


def accuracy_pairs(completions: list, solution: list[str | None]) -> list[tuple[str, str] | None]:
    """What is verified: the text of each completion and its reference; None where there is no reference."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [None if gold is None else (text or "", gold) for text, gold in zip(texts, solution, strict=True)]


accuracy_reward = make_accuracy_reward()
"""The reward of a verified answer, 1 or 0, by math-verify; None without a reference, or where verification ran out of time."""


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    """Zero for every completion: for data whose solutions hold no answer to verify."""
    return [0.0] * len(completions)


def skip_errors(reward: Callable) -> Callable:
    """A reward function whose rows have no reward where it raises, instead of ending the run; the log counts them.

    Args:
        reward: a function in TRL's form; give the result to a trainer as one of `reward_funcs`.
    """
    skipping = functools.partial(reward)
    skipping._skips_errors = True
    return skipping


def skips_errors(reward: Any) -> bool:
    """Whether `skip_errors` made a reward function."""
    return getattr(reward, "_skips_errors", False)


def guard_rewards(rewards: Any, errors: Counter) -> Any:
    """Wrap reward functions so that one that raises is named, or its rows skipped; names and `async` are kept.

    A function that raises on a whole batch is called again row by row. Its exception is raised with a note that names it and the
    first row that raises; where `skip_errors` made it, such rows have no reward instead.

    Args:
        rewards: what a GRPO trainer takes; models and their names are not wrapped.
        errors: gains, under the function's name, the number of rows skipped.
    """
    if isinstance(rewards, list):
        return [guard_rewards(reward, errors) for reward in rewards]
    if not callable(rewards) or isinstance(rewards, nn.Module):
        return rewards
    inner = rewards
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    attempts = functools.partial(_attempts, name, skips_errors(rewards), errors)
    is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)
    guard = (_guard_async if is_async else _guard)(rewards, attempts)
    guard.__name__ = name
    return guard


def _guard(reward: Callable, attempts: Callable) -> Callable:
    @functools.wraps(reward)
    def guarded(**columns):
        tries = attempts(columns)
        arguments = next(tries)
        while True:
            try:
                outcome = reward(**arguments)
            except Exception as error:
                outcome = error
            try:
                arguments = tries.send(outcome)
            except StopIteration as done:
                return done.value

    return guarded


def _guard_async(reward: Callable, attempts: Callable) -> Callable:
    @functools.wraps(reward)
    async def guarded(**columns):
        tries = attempts(columns)
        arguments = next(tries)
        while True:
            try:
                outcome = await reward(**arguments)
            except Exception as error:
                outcome = error
            try:
                arguments = tries.send(outcome)
            except StopIteration as done:
                return done.value

    return guarded


def _attempts(name: str, skip: bool, errors: Counter, columns: dict) -> Generator[dict, Any, list]:
    """Yields the arguments of each call, is sent its result or exception, returns one reward a row."""
    size = len(columns["completions"])
    log = _HeldLog(columns)
    batch = yield log.arguments(columns)
    if not isinstance(batch, Exception):
        log.pass_on()
        return batch
    rewards, raised = [], {}
    log = _HeldLog(columns)
    for row in range(size):
        one = yield log.arguments({key: _cell(value, row, size) for key, value in columns.items()})
        if isinstance(one, Exception):
            raised[row] = one
            if not skip:
                break
        rewards.append(None if row in raised else next(iter(one)))
        log.end_row()
    if not skip:
        batch = next(iter(raised.values()), batch)
        batch.add_note(
            f"Raised by the reward function {name!r} on {_place(raised, columns, size)}. "
            "trl_opsd.rewards.skip_errors(function) gives such rows no reward and counts them."
        )
        raise batch
    if raised:
        errors[name] += len(raised)
        warnings.warn(
            f"The reward function {name!r} raised {next(iter(raised.values()))!r} on {_place(raised, columns, size)}, "
            f"and on {len(raised)} of {size} rows in all. They have no reward; the log counts such rows as "
            f"rewards/{name}/errors.",
            stacklevel=2,
        )
    log.pass_on()
    return rewards


def _cell(value: Any, row: int, size: int) -> Any:
    return value[row : row + 1] if isinstance(value, list) and len(value) == size else value


def _place(raised: dict[int, Exception], columns: dict, size: int) -> str:
    """The first row that raised, with what stands in it."""
    if not raised:
        return f"a batch of {size} rows, but on no row alone"
    row = next(iter(raised))
    prompt, completion = (str(columns[name][row])[:80] for name in ("prompts", "completions"))
    return f"row {row} (prompt {prompt!r}, completion {completion!r})"


class _HeldLog:
    """Holds what a reward function logs until its call has worked: TRL's columns must have one value a row."""

    def __init__(self, columns: dict):
        self.to = {key: columns[key] for key in ("log_extra", "log_metric") if key in columns}
        self.metrics: list[tuple] = []
        self.extra: dict[str, list] = {}
        self.rows = 0

    def arguments(self, columns: dict) -> dict:
        own = {"log_extra": self._add_extra, "log_metric": lambda *args, **kwargs: self.metrics.append((args, kwargs))}
        return columns | {key: own[key] for key in self.to}

    def end_row(self) -> None:
        self.rows += 1
        for values in self.extra.values():
            values += [None] * (self.rows - len(values))

    def pass_on(self) -> None:
        for name, values in self.extra.items():
            self.to["log_extra"](name, values)
        for args, kwargs in self.metrics:
            self.to["log_metric"](*args, **kwargs)

    def _add_extra(self, column: str, values: list) -> None:
        self.extra.setdefault(column, [None] * self.rows).extend(values)
