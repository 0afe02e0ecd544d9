# SPDX-License-Identifier: Apache-2.0
"""A row's prompts as training renders them, and what stands at the boundary to the rollout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...methods import Method
from ...methods.privileged import PrivilegedText
from ...methods.stand_in import context_name, stand_in
from ...rows.texts import fill_template, rewrite_last_turn, without_empty_lines
from ...teacher.contexts import Rollout, TeacherContext
from ...teacher.prompts import TeacherCollator, left_pad

_BOUNDARY = 4  # tokens shown on each side
_STAND_IN = 32  # tokens of a solution that stand in for a rollout


@dataclass(frozen=True)
class View:
    """One rendered prompt of a row: the student's, or one that the teacher reads.

    Attributes:
        name: "student", or template and weight of a teacher's view, or what else is read or answered.
        ids: its tokens.
        template: the template that it fills, without the lines that this row leaves out; empty where there is none.
        shortened: its solution lost text to the budget.
        is_target: it is the target itself or read beside the student, not a direction whose views cancel where they
            agree, nor the plain prompt.
    """

    name: str
    ids: list[int]
    shortened: bool = False
    is_target: bool = False
    template: str = ""


def views_of(row: dict[str, Any], method: Method, args: Any, collator: TeacherCollator) -> list[View]:
    """The student's prompt of a row and every prompt its teacher would read, as training renders them."""
    prompt = row["prompt"]
    if args.prompt_template is not None:
        template = args.prompt_template
        student_prompt = rewrite_last_turn(prompt, lambda text: fill_template(template, prompt=text))
    else:
        student_prompt = prompt
    views = [View("student", collator.encode(student_prompt, TeacherContext("plain", None)).ids)]
    for name, context in _contexts(row, method, args, collator):
        encoded = collator.encode(student_prompt if context.template == "plain" else prompt, context)
        is_target = bool(context.anchor or context.read is not None) and context.template != "plain"
        views.append(View(name, encoded.ids, encoded.shortened, is_target, _filled_template(context, collator)))
    return views


def _filled_template(context: TeacherContext, collator: TeacherCollator) -> str:
    if context.own_prompt or context.template == "plain":
        return ""
    return without_empty_lines(
        collator.templates[context.template], [name for name, text in context.texts if text is None]
    )


def _contexts(
    row: dict[str, Any], method: Method, args: Any, collator: TeacherCollator
) -> Iterator[tuple[str, TeacherContext]]:
    """What is read of stand-in rollouts: the solution is a right one, an answer without a number a wrong one."""
    found, privileged = stand_in(method, args, row), PrivilegedText(method, args)
    text = row.get("solution") or "answer"
    rollout = Rollout(row["prompt"], row.get("solution"), text, 1.0, len(text), True, privileged.columns_of(row))
    (rollout,), _ = privileged.with_own_prompts(
        [rollout], lambda own, view: collator.encode(own.prompt, view), collator.special_tokens
    )
    if found.request is not None:
        request = privileged.view(found.request, rollout)
        yield f"{request.template} (the model answers it before scoring)", request
    for context in dict.fromkeys(found.drafts):
        request = privileged.view(context, rollout)
        yield f"{request.template} (the model answers it before scoring)", request
    for kind, context in found.views:
        context = privileged.view(context, rollout)
        yield context_name(context) + (f", of a {kind} rollout" if method.needs_group else ""), context
    for context in found.extra.contexts if found.extra is not None else ():
        context = privileged.view(context, rollout)
        yield f"{context_name(context)}, of the sequence beside the rollout", context


def row_lines(views: list[View], row: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """Prompts as rendered, the tokens at the boundary to a stand-in rollout, and whether its ids agree in all views."""
    rollout = tokenizer(row.get("solution") or "answer", add_special_tokens=False)["input_ids"][:_STAND_IN]
    for view in views:
        cut = ", solution shortened" if view.shortened else ""
        yield f"{view.name}: {len(view.ids)} tokens{cut}"
        yield from (f"  | {line}" for line in tokenizer.decode(view.ids).split("\n"))
        yield f"  boundary: {_tokens(tokenizer, view.ids[-_BOUNDARY:])} >> {_tokens(tokenizer, rollout[:_BOUNDARY])}"
    check_completion_ids([view.ids for view in views], rollout, tokenizer.pad_token_id or 0)
    yield f"completion ids: the same {len(rollout)} in all {len(views)} prompts, batched and padded as in training"


def check_completion_ids(contexts: list[list[int]], rollout: list[int], pad_id: int) -> None:
    """Batch the prompts as the teacher's forward does and compare what follows each, token by token.

    Raises:
        AssertionError: a row's prompt or rollout is not what was put in.
    """
    ids, mask = left_pad(contexts, pad_id)
    batch = torch.cat([ids, torch.tensor([rollout] * len(contexts), dtype=torch.long)], dim=1)
    mask = torch.cat([mask, torch.ones(len(contexts), len(rollout), dtype=mask.dtype)], dim=1)
    for row, context in enumerate(contexts):
        real = batch[row][mask[row].bool()].tolist()
        assert real[: len(context)] == context and real[len(context) :] == rollout, f"prompt {row} lost tokens"


def _tokens(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(f"{token}:{tokenizer.decode([token])!r}" for token in ids)
