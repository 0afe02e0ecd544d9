# SPDX-License-Identifier: Apache-2.0
"""What rows bring for the teacher to read: columns that a template names, prompts of their own, parts of solutions.

A method says which views there are and what it shows in them. Here the views get what belongs to the row, whatever the method:

1. A slot of a template that is neither the method's own nor `prompt` or `solution` is a column of the dataset.
2. Where the method allows it, a row's own prompt (of the function that `teacher_prompt_template` names, else of the column
   `teacher_prompt`) stands in place of the template `teacher`.
3. Of the solution the first steps are shown, or something else stands in its place (`shown_solution`).
"""

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from ..rows.checks import without_special_tokens
from ..rows.texts import OWN_PROMPT, Prompt, check_prompt, column_text, joined_parts, own_prompt, slots_of
from ..teacher.contexts import Contexts, Counted, Rollout, TeacherContext, all_templates
from ..user_functions import call_for_each, load_function
from .base import Extra, Method

_COMMON = ("prompt", "solution")
Encode = Callable[[Rollout, TeacherContext], Any]


class PrivilegedText:
    """The columns and prompts that rows bring, for one method under its settings.

    Args:
        method: whose contexts are completed.
        settings: of the run.

    Raises:
        ValueError: the settings ask for what the method does not take; names the setting.
    """

    def __init__(self, method: Method, settings: Any):
        self.method, self.settings = method, settings
        asked = {
            "teacher_prompt_template": (
                settings.teacher_prompt_function is None or method.own_prompts,
                "Give a template",
            ),
            "shown_solution": (settings.solution_share == 1 or method.solution_shares, "Leave it 1.0"),
        }
        for name, (is_fine, instead) in asked.items():
            if not is_fine:
                raise ValueError(
                    f"{name}={getattr(settings, name)!r} is not possible with {method.name}: {_REASONS[name]}. {instead}, "
                    "or take another method (docs/privileged-text.md lists those that take it)."
                )

    @cached_property
    def slots(self) -> dict[str, tuple[str, ...]]:
        """Columns that each template names."""
        templates, own = self._templates(self.settings), self._own_slots
        return {
            name: tuple(slot for slot in slots_of(text) if slot not in own[name]) for name, text in templates.items()
        }

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(slot for slots in self.slots.values() for slot in slots))

    @cached_property
    def read_columns(self) -> tuple[str, ...]:
        """Columns whose texts the teacher may read: the method's, the templates', and the rows' own prompts."""
        return tuple(dict.fromkeys((*self.method.columns, *self.columns, *[OWN_PROMPT] * self.method.own_prompts)))

    @cached_property
    def _own_slots(self) -> dict[str, set[str]]:
        """Slots that a method fills itself: those of its templates as they are by default."""
        first = copy.copy(self.settings)
        for each in fields(first):
            if each.name.endswith("_template") and each.default is not MISSING:
                setattr(first, each.name, each.default)
        return {name: {*_COMMON, *slots_of(text)} for name, text in self._templates(first).items()}

    def _templates(self, settings: Any) -> dict[str, str]:
        return all_templates(settings, self.method.templates(settings))

    # Before training

    def check_columns(self, columns: Collection[str] | None, place: str) -> None:
        """Check that every slot is a column, and that there are no prompts of rows where the method takes none.

        Args:
            columns: of a dataset or a row; None where a stream does not know them.
            place: where they are, for the message.

        Raises:
            ValueError: names the setting with the slot and the nearest name, or the column.
        """
        if columns is None:
            return
        for template, slots in self.slots.items():
            for slot in (slot for slot in slots if slot not in columns):
                known = [*sorted(self._own_slots[template]), *columns]
                near = get_close_matches(slot, known, n=1)
                raise ValueError(
                    f"{self._setting_of(template)}: `{{{slot}}}` is neither a slot that {self.method.name} fills nor a column of "
                    f"{place}, which has {sorted(columns)}.{f' Did you mean `{{{near[0]}}}`?' if near else ''} Correct the slot or "
                    "add the column. (On the command line, dataset_format keeps `prompt` and `solution` alone; use problem_column "
                    "and solution_column instead.)"
                )
        if OWN_PROMPT in columns and self.settings.solution_control is not None:
            raise ValueError(
                f"{place} has the column `{OWN_PROMPT}`, whose texts have no place for a solution, and shown_solution="
                f"{self.settings.shown_solution!r}. Rename the column, or leave shown_solution 1.0."
            )
        if OWN_PROMPT in columns and not self.method.own_prompts:
            raise ValueError(
                f"{place} has the column `{OWN_PROMPT}`, which {self.method.name} does not take: "
                f"{_REASONS['teacher_prompt_template']}. Rename the column, or take another method (docs/privileged-text.md)."
            )

    def _setting_of(self, template: str) -> str:
        """The setting that holds a template."""
        text = self._templates(self.settings)[template]
        names = (each.name for each in fields(self.settings) if each.name.endswith("_template"))
        named = next((name for name in names if getattr(self.settings, name) == text), None)
        return named or ("teacher_prompt_template" if template == "reference" else f"the template {template!r}")

    def solution_of(self, row: Mapping[str, Any]) -> str | None:
        """What the teacher is shown as the row's solution, as far as it is known before rollouts are."""
        rollout = Rollout(row["prompt"], row.get("solution"), "", columns=row)
        return rollout.solution if self.method.reference is None else self.method.reference(rollout)

    def check_row(self, row: Mapping[str, Any], place: str) -> None:
        """Check what a row brings; control tokens and lengths apart.

        Raises:
            ValueError: a column is missing or no text, or the row's own prompt is none; starts with `place`.
        """
        self.check_columns(row.keys(), place)
        for name in self.columns:
            column_text(row[name], f"{place}: `{name}`")
        own = own_prompt(row)
        if own is not None:
            _check_own_prompt(own, row["prompt"], place)

    # Of each rollout

    def columns_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `Rollout.columns` holds: what is read, and all of the row where a function of the user's may read it."""
        if self.settings.teacher_prompt_function is not None:
            return {name: value for name, value in row.items() if name not in _COMMON}
        return {name: row.get(name) for name in self.read_columns}

    def with_own_prompts(
        self, rollouts: Sequence[Rollout], encode: Encode, special_tokens: Sequence[str]
    ) -> tuple[list[Rollout], dict[str, int]]:
        """Rollouts with the prompts that they bring, and how many are their `own`, and how many `failed`.

        A prompt of the function's that is wrong in kind or too long counts as failed; the template takes its place.

        Args:
            rollouts: with their columns, rewards and notes.
            encode: a view's ids; raises a ValueError where it cannot be shown.
            special_tokens: what is taken out of the texts of the function.
        """
        if not self.method.own_prompts:
            return list(rollouts), {}
        counts = Counter({"own": 0, "failed": 0})
        found, errors = [], []
        for rollout, said in zip(rollouts, self._ask(rollouts), strict=True):
            try:
                prompt = self._prompt_of(rollout, said, encode, special_tokens)
            except Exception as error:  # the user's function, or what it gave: the template is there in any case
                errors.append(error)
                prompt = None
            counts["own"] += prompt is not None
            found.append(replace(rollout, teacher_prompt=prompt))
        counts["failed"] = len(errors)
        if errors:
            warnings.warn(
                f"teacher_prompt_template={self.settings.teacher_prompt_template!r} failed on {len(errors)} of {len(found)} "
                f"rollouts, for which the teacher reads the template: {errors[0]!r}.",
                stacklevel=2,
            )
        return found, dict(counts)

    def _ask(self, rollouts: Sequence[Rollout]) -> list[Any]:
        name = self.settings.teacher_prompt_function
        if name is None:
            return [None] * len(rollouts)
        function = load_function(name, "teacher_prompt_template", takes="a rollout")
        return call_for_each(function, rollouts)

    def _prompt_of(self, rollout: Rollout, said: Any, encode: Encode, special_tokens: Sequence[str]) -> Prompt | None:
        if isinstance(said, Exception):
            raise said
        if said is None:
            return own_prompt(rollout.columns)
        said = _without_control(said, special_tokens)
        _check_own_prompt(said, rollout.prompt, "what it gave")
        encode(rollout, TeacherContext("teacher", None, own_prompt=json.dumps(said)))
        return said

    # Of each view

    def view(self, context: TeacherContext, rollout: Rollout) -> TeacherContext:
        """A view with what the row brings."""
        if context.template == "teacher" and rollout.teacher_prompt is not None:
            own = json.dumps(rollout.teacher_prompt)
            return replace(context, slot=None, slot_tokens=None, texts=(), own_prompt=own)
        texts = self.texts(context.template, rollout.columns)
        given = {name for name, _ in context.texts}
        texts = tuple(pair for pair in texts if pair[0] not in given)
        return replace(context, texts=context.texts + texts) if texts else context

    def texts(self, template: str, columns: Mapping[str, Any]) -> tuple[tuple[str, str | None], ...]:
        """Name and text of the columns that a template names; None where one is empty."""
        names = self.slots.get(template, ())
        return tuple((name, column_text(columns.get(name), f"`{name}`")) for name in names)

    def views(self, contexts: Contexts, rollout: Rollout) -> Contexts:
        """A rollout's views with what the row brings; why there are none, or what is counted, stays."""
        if not contexts:
            return contexts
        views = tuple(self.view(context, rollout) for context in contexts)
        return Counted(views, contexts.reason) if isinstance(contexts, Counted) else views

    def extra(self, extra: Extra | None, rollout: Rollout) -> Extra | None:
        """The sequence beside a rollout, its views and its prompt with what the row brings."""
        if extra is None:
            return None
        prompt = None if extra.prompt is None else self.view(extra.prompt, rollout)
        return extra._replace(contexts=self.views(extra.contexts, rollout), prompt=prompt)

    def describe(self, columns: Collection[str] = ()) -> str:
        """What rows bring, in words; empty where it is the solution alone.

        Args:
            columns: of the dataset, as far as they are known.
        """
        told, share = [], self.settings.solution_share
        if self.columns:
            told.append(f"columns {', '.join(self.columns)}")
        if self.method.own_prompts and OWN_PROMPT in columns:
            told.append(f"a row's own prompt from the column {OWN_PROMPT}")
        if self.settings.teacher_prompt_function is not None:
            told.append(f"a row's own prompt from the function {self.settings.teacher_prompt_function}")
        if share != 1:
            told.append(f"of the solution's steps a share of {share}")
        if self.settings.solution_control is not None:
            told.append(f"in place of the row's solution {_CONTROLS[self.settings.solution_control]}")
        return "; ".join(told)


_CONTROLS = {
    "shuffled": "that of another problem",
    "empty": "nothing",
    "shortest_rollout": "the shortest other right rollout",
}
_REASONS = {
    "teacher_prompt_template": "what it compares are views that differ in a text within one template, or views that it writes "
    "itself, and a prompt of the row's own has no such place",
    "shown_solution": "it shows the teacher no solution, or shows it beside rollouts, which are whole",
}


def _check_own_prompt(own: Any, prompt: Prompt, place: str) -> None:
    """Check that a row's own prompt is text, or messages where `prompt` is a conversation."""
    check_prompt(own, place, OWN_PROMPT)
    if not isinstance(own, str) and isinstance(prompt, str):
        raise ValueError(
            f"{place}: `{OWN_PROMPT}` is a conversation, but `prompt` is text and is rendered without a chat template. Give both "
            "in one form."
        )
    try:
        json.dumps(own)
    except TypeError as error:
        raise ValueError(f"{place}: `{OWN_PROMPT}` holds what is no JSON: {error}. Give messages of texts.") from None


def _without_control(own: Any, tokens: Sequence[str]) -> Any:
    """A prompt whose texts spell out no control token; what is no prompt as it is."""
    if isinstance(own, str):
        return without_special_tokens(own, tokens)
    if not isinstance(own, list) or not all(isinstance(message, dict) for message in own):
        return own
    messages = [joined_parts(message) for message in own]
    return [
        {**message, "content": without_special_tokens(message["content"], tokens)}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
