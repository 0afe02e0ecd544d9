# SPDX-License-Identifier: Apache-2.0
"""What a method would read, from stand-in rollouts: for commands that have rows but no model, or neither, and for the card."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..teacher.contexts import Contexts, Draft, Moment, Rollout, TeacherContext, Written
from .base import Extra, Method

# Values of columns where there is no row, as long as what a method reads of them at most; other columns are a text.
COLUMNS: Mapping[str, Any] = {
    "skills": [f"skill {k}" for k in range(64)],
    "skill_scores": None,
    "rubric": ["criterion"],
    "spans": [(0, 1, "K", "a type"), (1, 2, "E", "a type")],
}
_WRITTEN = Written("(what the model writes)", [])
_LARGEST = 4
_MOST_DRAFTS = 64
_STEPS = 64  # within which a method that has extras now and then has one


@dataclass(frozen=True)
class StandIn:
    """What a method says of stand-in rollouts.

    Attributes:
        request: the context that the model answers before scoring, None where it is asked nothing.
        drafts: the contexts that it answers next, one after another, with answers that are wrong.
        views: which rollout, "right" or "wrong", and a context of the teacher on it; each context once.
        most: the contexts of the rollout that has most.
        extra: the sequence beside a rollout, None without.
    """

    request: TeacherContext | None = None
    drafts: tuple[TeacherContext, ...] = ()
    views: tuple[tuple[str, TeacherContext], ...] = ()
    most: Contexts = ()
    extra: Extra | None = None


def stand_in(method: Method, settings: Any, row: Mapping[str, Any] | None = None, *, most: int = _LARGEST) -> StandIn:
    """Ask a method about a mixed group, and about groups that are all wrong or all right where that one gives nothing.

    Args:
        method: that is asked.
        settings: of the run.
        row: of the dataset; None for texts that stand in for it.
        most: rollouts of a group, which has `num_generations` of them otherwise.
    """
    row = (
        {"prompt": "", "solution": "solution", **dict.fromkeys(method.columns, "text"), **COLUMNS}
        if row is None
        else row
    )
    size = min(settings.num_generations, most) if method.needs_group else 1
    groups = [["right"] * (size // 2) + ["wrong"] * (size - size // 2), ["wrong"] * size, ["right"] * size]
    moment = Moment(random.Random(0))
    request = None

    def group_of(kinds: Sequence[str]) -> list[Rollout]:
        rollouts, share = stand_in_group(method, row, kinds, request), settings.solution_share_at(0)
        rollouts = method.noted([replace(rollout, solution_share=share) for rollout in rollouts], settings, moment)
        return [with_drafts(method, rollout, settings, moment)[0] for rollout in rollouts]

    if method.asks is not None:
        request = method.asks(group_of(groups[0])[0], settings)
    _, drafts = with_drafts(method, group_of(groups[1])[0], settings, moment, reward=0.0)

    views: dict[TeacherContext, str] = {}
    longest: Contexts = ()
    for kinds in groups:
        contexts = method.contexts(group_of(kinds), settings, moment)
        for kind, own in sorted(zip(kinds, contexts, strict=True), key=lambda pair: pair[0], reverse=True):
            views = {**dict.fromkeys(own, kind), **views}
            longest = max(longest, own, key=len)
        if views and size > 1:
            break
    extra = None
    if method.extras is not None:
        moments = (replace(moment, step=step) for step in range(_STEPS))
        asked = (method.extras(group_of(kinds), settings, own) for own in moments for kinds in groups)
        extra = next((extra for group in asked for extra in group if extra is not None), None)
    return StandIn(request, drafts, tuple((kind, context) for context, kind in views.items()), tuple(longest), extra)


def with_drafts(
    method: Method, rollout: Rollout, settings: Any, moment: Moment, *, reward: float = 1.0
) -> tuple[Rollout, tuple[TeacherContext, ...]]:
    """A rollout with stand-ins for what is written for it, right or wrong ones, and the contexts that these answer."""
    asked: list[TeacherContext] = []
    rollout = replace(rollout, drafts=())
    while method.drafts is not None and len(asked) < _MOST_DRAFTS:
        context = method.drafts.asks(rollout, settings, moment)
        if context is None:
            break
        asked.append(context)
        draft = Draft(_WRITTEN.text, [], reward if method.drafts.top_k is not None else None)
        rollout = replace(rollout, drafts=(*rollout.drafts, draft))
    return rollout, tuple(asked)


def stand_in_group(
    method: Method, row: Mapping[str, Any], kinds: Sequence[str], request: TeacherContext | None = None
) -> list[Rollout]:
    """Rollouts of a row that are "right" or "wrong"; the solution is the first right one's text, a character counts as a token.

    Args:
        method: names the columns that it reads.
        row: with `prompt`, and what else there is.
        kinds: of the rollouts.
        request: what the model was asked, whose answer stands in.
    """
    texts = [_text(row, kind, kinds[:place].count(kind)) for place, kind in enumerate(kinds)]
    return [
        Rollout(
            row["prompt"],
            row.get("solution"),
            text,
            float(kind == "right"),
            len(text),
            finished=True,
            columns={name: row.get(name) for name in method.columns},
            written=None if request is None else _WRITTEN,
            token_ends=tuple(range(1, len(text) + 1)),
        )
        for kind, text in zip(kinds, texts, strict=True)
    ]


def _text(row: Mapping[str, Any], kind: str, place: int) -> str:
    if kind == "wrong":
        return "\\boxed{?}" if place == 0 else f"\\boxed{{?}} again, {place}"
    return (row.get("solution") or "a right rollout") if place == 0 else f"another right rollout, {place}"


def context_name(context: TeacherContext) -> str:
    """A view in words: its template, what it does, and whose weights read it where they are not the teacher's."""
    template = "own prompt of the row" if context.own_prompt else context.template
    if context.read is not None:
        role = f"read, weight {context.read:+.2g}"
    else:
        role = f"{'anchor' if context.anchor else 'direction'} {context.anchor or context.direction:+.2g}"
    weights = "" if context.weights == "teacher" else f", {context.weights} weights"
    return f"{template} ({role}{weights})"


def work_lines(method: Method, settings: Any, found: StandIn) -> list[tuple[str, str]]:
    """What a rollout costs beside its sampling and the student's forward, as pairs of a label and a text."""
    counts = _counts(found.most)
    lines = [("teacher", ", ".join(counts) if counts else "reads no rollout")]
    if found.request is not None:
        lines.append(
            (
                "written",
                f"a text of up to {settings.max_completion_length} tokens a rollout, to the prompt `{found.request.template}`",
            )
        )
    if found.drafts:
        prompts = ", ".join(
            f"{count} x `{name}`" for name, count in Counter(context.template for context in found.drafts).items()
        )
        lines.append(
            (
                "drafts",
                f"at most {len(found.drafts)} texts of up to {settings.max_completion_length} tokens a rollout, to the prompts {prompts}",
            )
        )
    if found.extra is not None:
        read = ", ".join(_counts(found.extra.contexts))
        lines.append(("beside it", f"a second sequence in the student's forward{', read by ' + read if read else ''}"))
    ways = {
        "token_weight": "the divergence, weighed token by token",
        "loss": "a loss of its own on the numbers of each token",
        "advantages": "TRL's policy-gradient loss with advantages of its own",
    }
    taken = [text for name, text in ways.items() if getattr(method, name) is not None] or [
        "the divergence to the target"
    ]
    if settings.reward_weight > 0 and method.advantages is None:
        taken.append("TRL's policy-gradient loss")
    if method.extra_term is not None:
        measured = "a loss of its tokens" if method.extra_term.divergence is None else "a divergence"
        taken.append(f"{measured} on the sequence beside it, weight {method.extra_term.weight(settings):g}")
    return [*lines, ("way", " and ".join(taken))]


def _counts(contexts: Iterable[TeacherContext]) -> list[str]:
    """Forwards by template and role, such as `2 x skill (read)`."""
    counts: dict[str, int] = {}
    for context in contexts:
        role = "read" if context.read is not None else "target"
        weights = "" if context.weights == "teacher" else f", {context.weights} weights"
        name = f"{context.template} ({role}{weights})"
        counts[name] = counts.get(name, 0) + 1
    return [f"{count} x {name}" for name, count in counts.items()]
