# SPDX-License-Identifier: Apache-2.0
"""MixSD (arXiv 2605.16865): each token from the bare prompt with probability lambda, else from the prompt that shows the answer.

One frozen model reads both prompts, and the continuation is shared. Completions whose answer is right are SFT data.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from ..evaluation.sampling import render_prompt
from ..rows.texts import as_text_turns, check_template, fill_template, is_missing, rewrite_last_turn
from .drawing import Choice

NAMES = ("bare prompt", "prompt with the solution")
BARE, SHOWN = range(2)


class Coin(Choice):
    """Draws a reader for each token alone."""

    def __init__(self, naive_share: float):
        """
        Args:
            naive_share: probability of the bare prompt, lambda in the paper, in [0, 1].
        """
        self.naive_share = naive_share

    def first(self, chance: float) -> int:
        """The bare prompt's reader where `chance` is below its share."""
        return BARE if chance < self.naive_share else SHOWN


def useful_tries(tries: int, naive_share: float, temperature: float) -> int:
    """Tries that can differ: without any chance in a completion, a second one repeats the first."""
    return 1 if temperature == 0 and naive_share in (0, 1) else tries


def expert_prompt(row: Mapping[str, Any], template: str) -> Any:
    """The row's prompt with its last turn put into a template that shows the solution."""
    return rewrite_last_turn(
        as_text_turns(row["prompt"]), lambda text: fill_template(template, prompt=text, solution=row["solution"])
    )


def make_source(options: argparse.Namespace, bare: Any, chat: Mapping[str, Any], rows: Any = None) -> Any:
    """The model under both prompts.

    Args:
        options: of `trl-opsd build mixsd`.
        bare: from a row to its prompt as the student reads it.
        chat: keyword arguments of the chat template.
        rows: not read; nothing is calibrated.
    """
    from ..commands.eval.run import load_model
    from .build import Source

    model, tokenizer = load_model(options.model_name_or_path, options.dtype)
    model.eval()

    def prompts(row: Mapping[str, Any]) -> list[list[int]]:
        shown = bare(row) if is_missing(row.get("solution")) else expert_prompt(row, options.expert_template)
        return [render_prompt(tokenizer, prompt, chat) for prompt in (bare(row), shown)]

    return Source(NAMES, (model, model), prompts, lambda: Coin(options.naive_share), tokenizer)


def check(options: argparse.Namespace) -> None:
    """Raise a ValueError for a template without its slots."""
    check_template("--expert_template", options.expert_template, "{prompt}", "{solution}")
