# SPDX-License-Identifier: Apache-2.0
"""Which rollouts of a group wait in the queue, and the prompt that shows one."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...evaluation.sampling import render_prompt
from ...methods.peers import shown_text
from ...rows.checks import without_special_tokens
from ...rows.formats import rewrite_prompt
from ...rows.texts import Prompt, as_text_turns, fill_template, rewrite_last_turn
from ...teacher.prompts import TeacherCollator
from .queue import Attempt
from .settings import CorrectionSettings

SKIPPED = ("unrewarded", "empty", "long")


def as_json_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, which must be JSON: it waits in the queue, and in checkpoints.

    Raises:
        ValueError: names the column that is not.
    """
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"The column `{name}` holds a {type(value).__name__}, which cannot wait in the queue of correction prompts ({error}). "
                "Remove the column, or write it as text."
            ) from error
    return row


class AttemptReader:
    """Finds attempts that can be shown.

    Args:
        settings: reads `correction_template`, `strip_thinking`, `right_attempt_share` and `reward_threshold`.
        tokenizer: of the model.
        longest: tokens that a correction prompt may have; None for no limit.
        template: into which a prompt is put when it is sampled from, None where the rows have it.
        chat_template_kwargs: with which it is rendered.
    """

    def __init__(
        self,
        settings: CorrectionSettings,
        tokenizer: Any,
        longest: int | None,
        template: str | None,
        chat_template_kwargs: dict[str, Any],
    ):
        self.settings, self.tokenizer, self.longest, self.template = settings, tokenizer, longest, template
        self.chat_template_kwargs = chat_template_kwargs
        self.special_tokens = TeacherCollator(tokenizer, {}).special_tokens

    def prompt(self, row: dict[str, Any], attempt: str) -> Prompt:
        """The row's question with an attempt at it, by `correction_template`."""
        template = self.settings.correction_template
        return rewrite_last_turn(
            as_text_turns(row["prompt"]), lambda text: fill_template(template, prompt=text, attempt=attempt)
        )

    def attempts(
        self, row: dict, texts: Sequence[str], rewards: Sequence[float | None], batch: int, seed: int, counts: Counter
    ) -> list[Attempt]:
        """At most one wrong and one right rollout of a group, by chance among those that can be shown.

        Args:
            row: of the group's question.
            texts, rewards: of its rollouts.
            batch: number of the generation batch.
            seed: of the chance, with the batch and the question.
            counts: gains the rollouts that were skipped, by the reasons of `SKIPPED`.
        """
        right = [None if reward is None else reward >= self.settings.reward_threshold for reward in rewards]
        counts["unrewarded"] += right.count(None)
        chance = random.Random(f"{seed}/{batch}/{row['prompt']!r}")
        kinds = (False, True) if self.settings.right_attempt_share else (False,)
        found = []
        for kind in kinds:
            own = [text for text, verdict in zip(texts, right, strict=True) if verdict is kind]
            text = self._first_shown(row, chance.sample(own, len(own)), counts)
            if text is not None:
                found.append(Attempt(row, text, kind, True in right and False in right, batch))
        return found

    def _first_shown(self, row: dict, texts: Sequence[str], counts: Counter) -> str | None:
        for text in texts:
            text = shown_text(text, self.settings)
            # Of a rollout that spells one out: it would end the turn.
            text = without_special_tokens(text, self.special_tokens).strip()
            if text and self._fits(row, text):
                return text
            counts["long" if text else "empty"] += 1
        return None

    def _fits(self, row: dict, text: str) -> bool:
        if self.longest is None:
            return True
        prompt = self.prompt(row, text)
        if self.template is not None:
            prompt = rewrite_prompt({"prompt": prompt}, self.template)["prompt"]
        return len(render_prompt(self.tokenizer, prompt, self.chat_template_kwargs)) <= self.longest
