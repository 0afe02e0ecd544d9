# SPDX-License-Identifier: Apache-2.0
"""Whether every prompt of a dataset can be shown to student and teacher; before training, without rendering them all."""

from collections.abc import Sequence
from typing import Any

from ..rows.checks import CHECKS_VERSION, check_no_special_token
from ..rows.passes import check_all_rows, check_datasets
from ..rows.texts import Prompt, message_text
from ..rows.token_counts import TokenCounts
from ..teacher.contexts import TeacherContext
from ..teacher.prompts import TeacherCollator
from .checks import named_place

_MARGIN = 16  # tokens that a text may take more within a template than alone


def check_prompts(
    collator: TeacherCollator,
    train_dataset: Any,
    eval_dataset: Any,
    first_rows: Sequence[int] = (),
    columns: Sequence[str] = (),
) -> None:
    """Check on one process that no row spells out a control token, exhausts the budget or has too few positions.

    The first row is rendered with every template, and so are `first_rows` and whatever comes near a limit; of a stream
    the first row is checked. A collective.

    Args:
        collator: of the run.
        train_dataset: with the columns `prompt` and, where there is one, `solution`.
        eval_dataset: the same, a dict of them, or None.
        first_rows: indices into the training set of what is trained on first; these are checked before all others.
        columns: further ones whose texts the teacher reads.

    Raises:
        ValueError: the chat template refuses, a text spells out a control token, the budget leaves nothing of the
            solution, or the model has too few positions; names dataset and row.
    """
    check = PromptCheck(collator, columns)

    def check_dataset(dataset: Any, name: str) -> None:
        check.check_dataset(dataset, name, first_rows if name == "train_dataset" else ())

    check_datasets(check_dataset, train_dataset, eval_dataset)


class PromptCheck:
    """The limits of a run, and which rows come near them.

    Args:
        collator: of the run; its templates are rendered once.
        columns: beside prompt and solution, whose texts the teacher reads.
    """

    def __init__(self, collator: TeacherCollator, columns: Sequence[str] = ()):
        self.collator, self.columns = collator, tuple(columns)
        self.counts = TokenCounts(collator.tokenizer)
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
        near = set(range(len(rows))) if exact else self._near_a_limit(rows)
        for index, row in enumerate(rows):
            place = f"{name} row {start + index}"
            with named_place(place):
                check_no_special_token(row, place, self.collator.special_tokens, self.columns)
                if index in near:
                    self._check_exactly(row)

    def _near_a_limit(self, rows: Sequence[dict]) -> set[int]:
        if self.problem_limit is None:
            return set()
        problems = [_problem_text(row["prompt"]) for row in rows]
        near = self.counts.may_exceed(problems, self.problem_limit)
        if self.row_limit is not None:
            texts = [f"{problem} {row.get('solution') or ''}" for problem, row in zip(problems, rows, strict=True)]
            near |= self.counts.may_exceed(texts, self.row_limit)
        return near

    def _check_exactly(self, row: dict) -> None:
        self.collator.check_renders(row["prompt"])
        for template in self.collator.templates:
            self.collator.check_budget(row["prompt"], template)
        if self.row_limit is not None and row.get("solution"):
            self.collator.encode(row["prompt"], TeacherContext("teacher", row["solution"]))


def _problem_text(prompt: Prompt) -> str:
    """What stands in place of the problem; of several turns with what a template puts around each, or more."""
    if isinstance(prompt, str):
        return prompt
    return message_text(prompt[0]) if len(prompt) == 1 else f"{prompt}"
