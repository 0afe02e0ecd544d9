# SPDX-License-Identifier: Apache-2.0
"""Settings of a playbook: lessons that the model writes down in the course of a run, for its teacher to read."""

from dataclasses import dataclass

from ..rows.texts import check_template
from .fields import option, require

PRUNINGS = ("staleness", "prioritized")

PLAYBOOK_BLOCK = """

What you have learnt from other problems stands between the two marks, with how often each lesson helped and harmed.

=== Playbook begins ===
{text}
=== Playbook ends ==="""

_FORM = """Answer with one JSON object and with nothing else, in this form:

"""
_TAGS = '"tags": [{"id": 7, "tag": "helpful"}, {"id": 9, "tag": "harmful"}]'

LESSON_PROMPT_TEMPLATE = (
    """{prompt}{solution}

The attempt was found wrong. Say of each lesson of the playbook that bears on it whether following it would have been helpful or harmful here. Then write down what the playbook lacks: short lessons for other problems of this kind, which do not give away the result of this one. Lists may be empty. """
    + _FORM
    + "{"
    + _TAGS
    + ', "add": [{"section": "mistakes", "lesson": "Check the sign before you add."}]}'
    + "\n\nA section is strategies, formulas, code, mistakes, heuristics, clues or others."
)

TAG_PROMPT_TEMPLATE = (
    """{prompt}{solution}

The attempt was found right. Say of each lesson of the playbook that bears on it whether following it was helpful, or would have been harmful here. The list may be empty. """
    + _FORM
    + "{"
    + _TAGS
    + "}"
)


@dataclass
class PlaybookSettings:
    """Whether a playbook is kept, and how it is written and pruned; the defaults are RESD's for MANUFACTORIA.

    The scripts for FINER and the easy simulations keep 120 lessons, the one for the medium simulations 150, which are pruned as
    `prioritized`.
    """

    write_playbook: bool = option(
        True,
        "The model writes lessons about its wrong rollouts and judges them by all of them; the teacher reads them.",
    )
    max_playbook_lessons: int = option(200, "Lessons that are kept at most, 1 or more.")
    playbook_prune_batches: int = option(4, "Generation batches between two prunings, 1 or more.")
    playbook_pruning: str = option(
        "staleness",
        "What a pruning removes beside lessons that harmed as often as they helped: `staleness` those that nobody has judged for "
        "two batches and more, `prioritized` all that nobody has judged. Beyond the limit, those judged longest ago.",
    )
    playbook_block: str = option(PLAYBOOK_BLOCK, "What stands around the playbook, `{text}`.")
    lesson_prompt_template: str = option(
        LESSON_PROMPT_TEMPLATE,
        "What the model answers about a wrong rollout for the playbook; holds `{prompt}` and `{solution}`, the blocks.",
    )
    tag_prompt_template: str = option(
        TAG_PROMPT_TEMPLATE,
        "What it answers about a right rollout where there are lessons; holds `{prompt}` and `{solution}`, the blocks.",
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.max_playbook_lessons >= 1, self, "max_playbook_lessons", "1 or more")
        require(self.playbook_prune_batches >= 1, self, "playbook_prune_batches", "1 or more")
        require(self.playbook_pruning in PRUNINGS, self, "playbook_pruning", f"one of {PRUNINGS}")
        check_template("playbook_block", self.playbook_block, "{text}")
        for name in ("lesson_prompt_template", "tag_prompt_template"):
            check_template(name, getattr(self, name), "{prompt}", "{solution}")
