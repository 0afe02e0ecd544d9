# SPDX-License-Identifier: Apache-2.0
"""Texts that the model writes for a rollout before contexts are made: asked one after another, rewarded, and compared with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import gather_object

from ..methods import Drafts
from ..teacher.contexts import Draft, Moment, Rollout, TeacherContext, Written
from .scorer import Scorer

Write = Callable[[Sequence[TeacherContext | None], Mapping[str, float]], list[Written | None] | None]
Reward = Callable[[list[dict], list[str], list[list[int]]], list[float | None]]


class DraftWriter:
    """Has the model write what `Method.drafts` asks for.

    Args:
        scorer: of the run, with the method.
        settings: of the run.
        reward: rewards of answers (texts and ids) to this rank's rows, one each, None without; a collective.
        log: takes numbers that are the same on every rank.
    """

    def __init__(self, scorer: Scorer, settings: Any, reward: Reward, log: Callable[[dict[str, float]], None]):
        self.scorer, self.settings, self.reward, self.log = scorer, settings, reward, log

    def write(
        self, rollouts: Sequence[Rollout], rows: list[dict], ids: Sequence[list[int]], moment: Moment, write: Write
    ) -> list[Rollout]:
        """The rollouts with their drafts; a collective.

        Args:
            rollouts: of this rank.
            rows: of each, as the student gets them.
            ids: of each, as they were sampled.
            moment: of the batch.
            write: what the model answers to a context for each row, None where there is none; None where no rank asks.
        """
        rule, settings = self.scorer.method.drafts, self.settings
        rollouts, sampling = list(rollouts), {} if rule.sampling is None else rule.sampling(settings)
        while (answers := write([rule.asks(each, settings, moment) for each in rollouts], sampling)) is not None:
            rewards = self._rewards(rule, rows, answers)
            for place, (answer, reward) in enumerate(zip(answers, rewards, strict=True)):
                if answer is not None:
                    draft = Draft(answer.text, answer.ids, reward)
                    rollouts[place] = replace(rollouts[place], drafts=(*rollouts[place].drafts, draft))
        if rule.top_k is not None and any(gather_object([any(each.drafts for each in rollouts)])):
            rollouts = self._compared(rollouts, rows, ids, rule.top_k(settings))
        self._log(rule, rollouts)
        return rollouts

    def _rewards(self, rule: Drafts, rows: list[dict], answers: Sequence[Written | None]) -> list[float | None]:
        if rule.top_k is None:
            return [None] * len(answers)
        known = [answer or Written("", []) for answer in answers]  # of every row: rewards are gathered from all ranks
        return self.reward(rows, [answer.text for answer in known], [answer.ids for answer in known])

    def _compared(self, rollouts: list[Rollout], rows: list[dict], ids: Sequence[list[int]], k: int) -> list[Rollout]:
        """With `Draft.overlap`, by one forward of the student over the rollouts."""
        others = [[draft.ids for draft in each.drafts] for each in rollouts]
        shares = self.scorer.overlaps([row["prompt"] for row in rows], ids, others, k)
        return [
            replace(each, drafts=tuple(replace(draft, overlap=s) for draft, s in zip(each.drafts, own, strict=True)))
            for each, own in zip(rollouts, shares, strict=True)
        ]

    def _log(self, rule: Drafts, rollouts: Sequence[Rollout]) -> None:
        drafts = gather_object([(len(d.ids), d.reward, d.overlap) for each in rollouts for d in each.drafts])
        numbers = {"drafts/texts": len(drafts), "drafts/tokens": sum(length for length, *_ in drafts)}
        if rule.top_k is not None and drafts:
            threshold = self.settings.reward_threshold
            numbers["drafts/right"] = sum(r is not None and r >= threshold for _, r, _ in drafts) / len(drafts)
            numbers["drafts/overlap"] = sum(overlap for *_, overlap in drafts) / len(drafts)
        self.log({name: float(value) for name, value in numbers.items()})
