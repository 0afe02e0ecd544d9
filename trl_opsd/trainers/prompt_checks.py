# SPDX-License-Identifier: Apache-2.0
"""Whether every prompt of a dataset can be shown to student and teacher; before training, without rendering them all."""

from collections.abc import Sequence
from typing import Any

from ..methods.privileged import PrivilegedText
from ..rows.checks import CHECKS_VERSION, check_no_special_token
from ..rows.passes import check_all_rows, check_datasets
from ..rows.texts import Prompt, column_text, message_text, own_prompt
from ..rows.token_counts import TokenCounts
from ..teacher.contexts import Rollout, TeacherContext
from ..teacher.prompts import TeacherCollator
from .checks import named_place

_MARGIN = 16  # tokens that a text may take more within a template than alone


def check_prompts(
    collator: TeacherCollator,
    train_dataset: Any,
    eval_dataset: Any,
    first_rows: Sequence[int] = (),
    privileged: PrivilegedText | None = None,
) -> None:
    """Check on one process that no row spells out a control token, exhausts the budget or has too few positions.

    The first row is rendered with every template, and so are `first_rows`, whatever comes near a limit and the first row of each
    order of roles; of a stream the first row is checked. A collective.

    Args:
        collator: of the run.
        train_dataset: with the columns `prompt` and, where there is one, `solution`.
        eval_dataset: the same, a dict of them, or None.
        first_rows: indices into the training set of what is trained on first; these are checked before all others.
        privileged: what rows bring beside prompt and solution.

    Raises:
        ValueError: the chat template refuses, a text spells out a control token, a column is no text, the budget leaves nothing
            of the solution, or the model has too few positions; names dataset and row.
    """
    check = PromptCheck(collator, privileged)

    def check_dataset(dataset: Any, name: str) -> None:
        check.check_dataset(dataset, name, first_rows if name == "train_dataset" else ())

    check_datasets(check_dataset, train_dataset, eval_dataset)


class PromptCheck:
    """The limits of a run, and which rows come near them.

    Args:
        collator: of the run; its templates are rendered once.
        privileged: what rows bring beside prompt and solution.
    """

    def __init__(self, collator: TeacherCollator, privileged: PrivilegedText | None = None):
        self.collator, self.privileged = collator, privileged
        self.columns = () if privileged is None else privileged.read_columns
        self.counts = TokenCounts(collator.tokenizer)
        self._forms: set[Any] = set()
        positions, budget = collator.max_positions, collator.max_length
        limits = [limit for limit in (positions, budget) if limit is not None]
        room = collator.template_length + _MARGIN if limits else 0
        # Tokens that a problem may have; and with its solution, which a budget within the positions shortens.
        self.problem_limit = min(limits) - room if limits else None
        self.row_limit = None if positions is None or (budget or positions + 1) <= positions else positions - room

    def check_dataset(self, dataset: Any, name: str, first_rows: Sequence[int]) -> None:
        """Check the first row, the rows that are trained on first, and all others; raises as `check_prompts` does."""
        self.check_rows([next(iter(dataset))], 0, name, exact=True)
        if not hasattr(dataset, "__len__"):
            return
        for index in first_rows:
            self.check_rows([dataset[index]], index, name, exact=True)
        names = ("prompt", "solution", *self.columns)
        dataset = dataset.select_columns([name for name in names if name in dataset.column_names])
        check_all_rows(
            dataset,
            lambda rows, start: self.check_rows(rows, start, name),
            key=lambda: f"prompts {CHECKS_VERSION} {self.columns} {self.collator.settings_key()}",
            name=name,
        )

    def check_rows(self, rows: Sequence[dict], start: int, name: str, *, exact: bool = False) -> None:
        """Check rows in order, of which the first has the index `start`; `exact` renders each."""
        near = set(range(len(rows))) if exact else self._near_a_limit(rows) | self._in_new_form(rows)
        for index, row in enumerate(rows):
            place = f"{name} row {start + index}"
            with named_place(place):
                if self.privileged is not None:
                    self.privileged.check_row(row, place)
                check_no_special_token(row, place, self.collator.special_tokens, self.columns)
                if index in near:
                    self._check_exactly(row)

    def _in_new_form(self, rows: Sequence[dict]) -> set[int]:
        """Rows whose turns have an order of roles that no row before had: a chat template may refuse it."""
        found = set()
        for index, row in enumerate(rows):
            prompt = row["prompt"]
            form = "text" if isinstance(prompt, str) else tuple(turn.get("role") for turn in prompt)
            if form not in self._forms:
                self._forms.add(form)
                found.add(index)
        return found

    def _near_a_limit(self, rows: Sequence[dict]) -> set[int]:
        if self.problem_limit is None:
            return set()
        problems = [self._unshortened_text(row) for row in rows]
        near = self.counts.may_exceed(problems, self.problem_limit)
        if self.row_limit is not None:
            texts = [f"{problem} {self._solution(row) or ''}" for problem, row in zip(problems, rows, strict=True)]
            near |= self.counts.may_exceed(texts, self.row_limit)
        return near

    def _unshortened_text(self, row: dict) -> str:
        """Whatever of a row stands whole in some prompt, in one text."""
        if self.privileged is None:
            return _problem_text(row["prompt"])
        texts = [column_text(row[name], name) or "" for name in self.privileged.columns]
        return " ".join([_problem_text(row["prompt"]), *texts, f"{own_prompt(row) or ''}"])

    def _solution(self, row: dict) -> str | None:
        return row.get("solution") if self.privileged is None else self.privileged.solution_of(row)

    def _check_exactly(self, row: dict) -> None:
        prompt = row["prompt"]
        self.collator.check_renders(prompt)
        view = TeacherContext("teacher", self._solution(row))
        if self.privileged is not None:
            rollout = Rollout(prompt, row.get("solution"), "", columns=row, teacher_prompt=own_prompt(row))
            view = self.privileged.view(view, rollout)
        for template in self.collator.templates:
            texts = () if self.privileged is None else self.privileged.texts(template, row)
            if not (view.own_prompt and template in ("teacher", "reference")):  # which this row has no use for
                self.collator.check_budget(prompt, template, texts)
        if view.own_prompt or (self.row_limit is not None and self._solution(row)):
            self.collator.encode(prompt, view)


def _problem_text(prompt: Prompt) -> str:
    """What stands in place of the problem; of several turns with what a template puts around each, or more."""
    if isinstance(prompt, str):
        return prompt
    return message_text(prompt[0]) if len(prompt) == 1 else f"{prompt}"
