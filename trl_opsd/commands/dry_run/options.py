# SPDX-License-Identifier: Apache-2.0
"""The options of `trl-opsd dry-run`, apart from what it runs, so that help answers at once."""

from ...pages import PAGES
from ..arguments import CommandParser


def make_parser() -> CommandParser:
    """The options of the command; all other words are the training command's."""
    parser = CommandParser(
        prog="trl-opsd dry-run",
        usage="trl-opsd dry-run METHOD --config RECIPE.yaml [--rows N] [--SETTING VALUE ...]",
        description="Print prompts as rendered, ids at the boundary, batch, steps, lengths and mismatches of a run. All "
        "other options are those of the training command, `--config` and launcher options among them.",
    )
    parser.add_argument("method", choices=[*PAGES], metavar="METHOD", help=f"the training command: {', '.join(PAGES)}")
    parser.add_argument("--rows", type=int, default=2, help="rows to print")
    return parser
