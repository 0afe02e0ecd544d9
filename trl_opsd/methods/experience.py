# SPDX-License-Identifier: Apache-2.0
"""What RESD remembers from batch to batch: how rare each outcome was, a right rollout of each prompt, and its playbook."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..losses import outcome_weights
from ..teacher.contexts import Rollout
from .base import Seen
from .groups import split_by_reward
from .peers import prompt_key, shown_text
from .playbook import playbook_of, written_book


def outcome_memory(memory: Mapping[str, Any], seen: Seen, settings: Any) -> dict[str, Any]:
    """The weights of right and wrong rollouts of the batch, the last right rollout of each prompt, and the playbook."""
    right, wrong = split_by_reward(seen.rollouts, settings.reward_threshold)
    kept = kept_texts(memory.get("solutions", {}), (seen.rollouts[index] for index in right), settings)
    weights = list(outcome_weights(len(right), len(wrong)))
    return {"weights": weights, "solutions": kept, "playbook": written_book(memory, seen.rollouts, settings)}


def outcome_report(memory: Mapping[str, Any]) -> dict[str, float]:
    """Both weights, how many solutions and lessons are kept, and how many answers of the last batch held no lessons."""
    (of_right, of_wrong), book = memory["weights"], playbook_of(memory)
    weights = {"right_weight": of_right, "wrong_weight": of_wrong, "kept_solutions": len(memory["solutions"])}
    return {**weights, "lessons": len(book["lessons"]), "unread_lessons": book["unread"]}


def kept_texts(kept: Mapping[str, str], rollouts: Iterable[Rollout], settings: Any) -> dict[str, str]:
    """The last of the rollouts of each prompt, by `prompt_key`, added to those kept before; at most `max_kept_solutions`, the newest."""
    texts = dict(kept)
    for rollout in rollouts:
        texts.pop(prompt_key(rollout), None)  # what is put in again goes to the end
        texts[prompt_key(rollout)] = shown_text(rollout.completion, settings)
    return dict(list(texts.items())[max(0, len(texts) - settings.max_kept_solutions) :])
