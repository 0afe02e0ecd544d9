# SPDX-License-Identifier: Apache-2.0
"""A playbook: lessons with counters, which the model writes and judges, and which are pruned (RESD, arXiv 2605.12741).

A lesson counts how often the model called it helpful and harmful, and remembers when it was last judged. In every generation batch

1. the judgements of all rollouts are counted, those of right ones once a prompt,
2. the lessons that wrong rollouts add are appended, those of one rollout a prompt,
3. and every few batches, or beyond the limit, the book is pruned.

The book is JSON, so checkpoints hold it. All functions leave their arguments as they are and draw nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..teacher.contexts import Moment, Rollout, TeacherContext
from .groups import is_right
from .peers import block, prompt_key, shown_text

SECTIONS = ("strategies", "formulas", "code", "mistakes", "heuristics", "clues", "others")
EMPTY: Mapping[str, Any] = {"lessons": [], "next_id": 1, "batches": 0, "unread": 0}
_OBJECT = re.compile(r'\{\s*"')
Lesson = dict[str, Any]  # id, section, text, helpful, harmful, judged


def playbook_text(book: Mapping[str, Any]) -> str:
    """The lessons by section, a line each; empty without any."""
    lines = []
    for section in SECTIONS:
        own = [lesson for lesson in book["lessons"] if lesson["section"] == section]
        lines += [f"## {section}"] if own else []
        lines += [
            f"[{each['id']}] helpful {each['helpful']}, harmful {each['harmful']}: {each['text']}" for each in own
        ]
    return "\n".join(lines)


def playbook_of(memory: Mapping[str, Any]) -> Mapping[str, Any]:
    """The book that a method's memory holds, an empty one at first."""
    return memory.get("playbook", EMPTY)


def playbook_block(settings: Any, moment: Moment) -> str:
    """What the teacher reads of the book: nothing while it is empty."""
    return block(settings.playbook_block, playbook_text(playbook_of(moment.memory)))


def lesson_request(rollout: Rollout, settings: Any, moment: Moment) -> TeacherContext | None:
    """What the model answers for the book about a rollout: judgements and new lessons, or judgements of a right one."""
    if not settings.write_playbook or rollout.drafts or rollout.reward is None:
        return None
    book = playbook_block(settings, moment)
    right = is_right(rollout, settings.reward_threshold)
    if right and not book:
        return None
    blocks = block(settings.attempt_block, shown_text(rollout.completion, settings))
    if not right:
        review = None if rollout.written is None else shown_text(rollout.written.text, settings)
        blocks += block(settings.feedback_block, rollout.note) + block(settings.review_block, review)
    name = "tags" if right else "lessons"
    return TeacherContext(name, blocks + book, settings.max_rollout_context_length, weights="live")


def written_book(memory: Mapping[str, Any], rollouts: Sequence[Rollout], settings: Any) -> Mapping[str, Any]:
    """The book after a generation batch.

    Args:
        memory: of the method, with the book before.
        rollouts: of all ranks; the first draft of each is the answer to `lesson_request`.
        settings: reads `max_playbook_lessons`, `playbook_prune_batches` and `playbook_pruning`.
    """
    if not settings.write_playbook:
        return playbook_of(memory)
    wrong, right, unread = _answers(rollouts, settings)
    book = playbook_of(memory)
    lessons, now = [dict(lesson) for lesson in book["lessons"]], book["batches"]
    _judge(lessons, [*wrong, *_first_of_prompts(right)], now)
    new = [pair for _, answer in _first_of_prompts(wrong) for pair in _additions(answer)]
    lessons += [
        {"id": book["next_id"] + place, "section": section, "text": text, "helpful": 0, "harmful": 0, "judged": now}
        for place, (section, text) in enumerate(new)
    ]
    limits = settings.playbook_pruning, settings.max_playbook_lessons
    if len(lessons) > settings.max_playbook_lessons:
        lessons = pruned(lessons, now, *limits)
    if (now + 1) % settings.playbook_prune_batches == 0:
        lessons = pruned(lessons, now + 1, *limits)
    return {"lessons": lessons, "next_id": book["next_id"] + len(new), "batches": now + 1, "unread": unread}


def pruned(lessons: Sequence[Lesson], now: int, pruning: str, most: int) -> list[Lesson]:
    """The lessons that stay, in their order.

    Args:
        lessons: of a book.
        now: generation batches so far.
        pruning: "staleness" or "prioritized", see `PlaybookSettings`.
        most: that stay; of more the ones judged longest ago go, of these the oldest.
    """
    kept = [lesson for lesson in lessons if _stays(lesson, now, pruning)]
    newest = sorted(kept, key=lambda lesson: (lesson["judged"], lesson["id"]))[-most:]
    names = {lesson["id"] for lesson in newest}
    return [lesson for lesson in kept if lesson["id"] in names]


def _stays(lesson: Lesson, now: int, pruning: str) -> bool:
    if lesson["helpful"] + lesson["harmful"] == 0:
        return pruning == "staleness" and now - lesson["judged"] <= 1
    return lesson["helpful"] > lesson["harmful"]


def _judge(lessons: Sequence[Lesson], answers: Sequence[tuple[str, dict]], now: int) -> None:
    """Count judgements; of what names no lesson, or none of the two tags, nothing is counted."""
    known = {lesson["id"]: lesson for lesson in lessons}
    for _, answer in answers:
        judged = {}
        for tag in _dicts(answer.get("tags")):
            judged[_number(tag.get("id"))] = tag.get("tag")
        for name, tag in judged.items():
            if name in known:
                known[name]["judged"] = now
                if tag in ("helpful", "harmful"):
                    known[name][tag] += 1


def _additions(answer: dict) -> Iterator[tuple[str, str]]:
    """Section and text of new lessons, each on one line."""
    for entry in _dicts(answer.get("add")):
        text = " ".join(str(entry.get("lesson") or "").split())
        section = str(entry.get("section")).strip().lower()
        if text:
            yield section if section in SECTIONS else "others", text


def _answers(rollouts: Sequence[Rollout], settings: Any) -> tuple[list[tuple[str, dict]], list[tuple[str, dict]], int]:
    """What was answered about wrong and about right rollouts, with the prompt's key, and how many answers are no such JSON."""
    wrong, right, unread = [], [], 0
    for rollout in (each for each in rollouts if each.drafts):
        answer = read_answer(shown_text(rollout.drafts[0].text, settings))
        unread += answer is None
        if answer is not None:
            kind = right if is_right(rollout, settings.reward_threshold) else wrong
            kind.append((prompt_key(rollout), answer))
    return wrong, right, unread


def read_answer(text: str) -> dict | None:
    """The first JSON object in a text that has `tags` or `add`; None without one."""
    decoder = json.JSONDecoder()
    for start in _OBJECT.finditer(text):
        try:
            found, _ = decoder.raw_decode(text, start.start())
        except ValueError:
            continue
        except RecursionError:  # every brace behind this one is as deep
            return None
        if {"tags", "add"} & found.keys():
            return found
    return None


def _first_of_prompts(answers: Sequence[tuple[str, dict]]) -> list[tuple[str, dict]]:
    return list({key: (key, answer) for key, answer in reversed(answers)}.values())[::-1]


def _dicts(value: Any) -> list[dict]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _number(value: Any) -> int | None:
    """An id as the model may write it: 7, "7" or "[7]"."""
    text = str(value).strip("[] ")
    return int(text) if text.isascii() and text.isdigit() else None
