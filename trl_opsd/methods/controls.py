# SPDX-License-Identifier: Apache-2.0
"""Controls of the reference: a method whose teacher is shown something else in place of the row's solution.

How much of a gain needs the reference is what such a run measures. Rewards read the row's own solution, whatever is shown.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..rows.texts import is_missing, without_blocks
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Unused
from .base import Method
from .groups import split_by_reward
from .stand_in import StandIn, stand_in

OTHER_SOLUTION = "solution_of_another_row"  # the column that `with_other_solutions` adds
_MARK = "what stands in the solution's place"


def controlled(method: Method, settings: Any) -> Method:
    """The method with the reference that `shown_solution` asks for.

    Raises:
        ValueError: the method shows no solution, or cannot show what is asked for; names the setting.
    """
    control = settings.solution_control
    if control is None:
        return method
    check_control(method, settings)
    if control == "empty":
        # Nothing is left whose signal could be decomposed.
        return replace(method, reference=lambda rollout: "", decomposition_steps=_never)
    if control == "shuffled":
        needed = partial(_with_column, method)
        columns = (*method.columns, OTHER_SOLUTION)
        return replace(method, reference=_of_another_row, columns=columns, needs_columns=needed)
    contexts = partial(shortest_rollout_contexts, method)
    return replace(
        method,
        contexts=contexts,
        contexts_from_rows=False,
        needs_group=True,
        needs_reward=True,
        decomposition_steps=_never,
    )


def check_control(method: Method, settings: Any) -> None:
    """Check that the method shows what the control replaces; raises as `controlled` does."""
    control, reason = settings.solution_control, None
    shown, trained = uses_of_solution(method, settings)
    if not shown:
        reason = "its teacher is shown no solution"
    elif trained:
        reason = "the student trains on the solution itself"
    elif control == "shortest_rollout" and not method.solution_shares:
        reason = "its teacher is shown rollouts beside the solution already"
    elif control == "shortest_rollout" and (method.asks is not None or method.drafts is not None):
        reason = "the model writes about the solution before rollouts are rewarded"
    if reason is not None:
        raise ValueError(
            f"shown_solution={control!r} is not possible with {method.name}: {reason}. Leave it 1.0, or take another method "
            "(docs/privileged-text.md lists those that take it)."
        )


def uses_of_solution(method: Method, settings: Any) -> tuple[bool, bool]:
    """Whether a view of the teacher's holds the solution of the row, and whether a sequence beside a rollout is that solution."""
    marked = replace(method, reference=lambda rollout: _MARK)
    # Some show it beside other rollouts, and some where a rollout has no right peer, as one alone.
    found = [stand_in(marked, settings), stand_in(marked, settings, most=1)]
    shown = any(_MARK in (text or "") for each in found for view in _all_views(each) for text in _texts(view))
    return shown, any(each.extra is not None and each.extra.sequence == _MARK for each in found)


def _all_views(found: StandIn) -> list[TeacherContext]:
    views = [view for _, view in found.views] + [found.request] * (found.request is not None) + list(found.drafts)
    return views + (list(found.extra.contexts) if found.extra is not None else [])


def _texts(view: TeacherContext) -> list[str | None]:
    return [view.slot, *(text for _, text in view.texts)]


def _never(settings: Any) -> int:
    return 0


def _with_column(method: Method, settings: Any) -> tuple[str, ...]:
    return (*method.needed_columns(settings), OTHER_SOLUTION)


def _of_another_row(rollout: Rollout) -> str | None:
    return rollout.columns[OTHER_SOLUTION]


# The shortest right rollout


def shortest_rollout_contexts(
    method: Method, group: Sequence[Rollout], settings: Any, moment: Moment
) -> list[Contexts]:
    """The method's contexts, with the shortest other right rollout as the solution; none where no other is right."""
    texts = shortest_others(group, getattr(settings, "reward_threshold", 0.5))
    rollouts = [replace(rollout, solution=text) for rollout, text in zip(group, texts, strict=True)]
    # One at a time: a method without groups expects nothing else, and one with them is told of all.
    asked = [rollouts] if method.needs_group else [[rollout] for rollout in rollouts]
    contexts = [views for part in asked for views in method.contexts(part, settings, moment)]
    return [Unused("no right peer") if text is None else views for text, views in zip(texts, contexts, strict=True)]


def shortest_others(group: Sequence[Rollout], threshold: float) -> list[str | None]:
    """Of each rollout the text of the right one with the fewest tokens but itself, without its thinking; the first of equals."""
    right, _ = split_by_reward(group, threshold)
    ranked = sorted(right, key=lambda index: group[index].num_tokens)
    chosen = [next((index for index in ranked if index != own), None) for own in range(len(group))]
    return [None if index is None else _without_thinking(group[index].completion) for index in chosen]


def _without_thinking(text: str) -> str:
    return without_blocks(text, "<think>", r"</think>\s*")


# Another problem's solution


def with_other_solutions(dataset: Any, settings: Any, name: str) -> Any:
    """The dataset, where solutions are shuffled with a column of another row's solution; None, or a dict of datasets, likewise.

    Args:
        dataset: with the columns `prompt` and `solution`.
        settings: of the run; its seed decides whose solution stands where, so that every rank and a resumed run see the same.
        name: of the dataset, for the message.

    Raises:
        ValueError: it is a stream, or some row has no other whose problem and solution differ from its own.
    """
    if settings.solution_control != "shuffled" or dataset is None:
        return dataset
    if isinstance(dataset, Mapping):
        return {key: with_other_solutions(part, settings, f"{name}[{key!r}]") for key, part in dataset.items()}
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"shown_solution='shuffled' needs every solution of {name} before training, and a stream has them one by one. Load "
            "it whole (dataset_streaming=False)."
        )
    prompts, solutions = [repr(prompt) for prompt in dataset["prompt"]], list(dataset["solution"])
    return dataset.add_column(OTHER_SOLUTION, other_solutions(prompts, solutions, settings.seed, name))


def other_solutions(prompts: Sequence[str], solutions: Sequence[str | None], seed: int, name: str) -> list[str | None]:
    """Of each row the solution of a drawn row with another problem and another solution; None for a row without one.

    Raises:
        ValueError: a row has no such other; names it.
    """
    given = [index for index, solution in enumerate(solutions) if not is_missing(solution)]
    order = random.Random(f"shuffled/{seed}").sample(given, len(given))
    others: list[str | None] = [None] * len(solutions)
    for place, index in enumerate(order):
        # The next one in a random order, so that each solution is shown about as often as it is there.
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        differs = (k for k in following if prompts[k] != prompts[index] and solutions[k] != solutions[index])
        found = next(differs, None)
        if found is None:
            raise ValueError(
                f"shown_solution='shuffled': no row of {name} differs from row {index} in problem and solution, so there is no "
                "other solution to show. Give rows with different solutions, or another control."
            )
        others[index] = solutions[found]
    return others
