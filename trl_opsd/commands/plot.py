# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd plot`: the curves of runs as a picture."""

from .arguments import CommandParser


def run_plot(arguments: list[str]) -> None:
    """`trl-opsd plot RUN [RUN ...] --output PICTURE`."""
    parser = CommandParser(prog="trl-opsd plot", description="Draw the curves of one or several runs.")
    parser.add_argument("runs", nargs="+", help="output folders, checkpoints or trainer_state.json files")
    parser.add_argument("--output", default="run.png", help="the picture, .png or .svg")
    options = parser.parse_args(arguments)
    from ..card.plots import plot_folders  # loads torch

    print(plot_folders(options.runs, options.output))
