# SPDX-License-Identifier: Apache-2.0
"""Options of `trl-opsd demo`; those it does not know override the demo's recipe."""

from ..commands.arguments import CommandParser


def run(arguments: list[str]) -> None:
    """Run the demo as a command line says."""
    parser = CommandParser(
        prog="trl-opsd demo",
        description="Train the embedded model and print what it gained on held-out problems. Other options override "
        "its recipe, trl_opsd/demo/opsd.yaml.",
    )
    parser.add_argument("--output_dir", default="outputs/demo", help="where the model, its card and the plot go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    parser.add_argument("--problems", type=int, default=300, help="held-out problems")
    parser.add_argument("--samples", type=int, default=4, help="samples a problem, the k of avg@k")
    options, overrides = parser.parse_known_args(arguments)

    from ..commands.arguments import read_command_line
    from ..commands.train import argument_types
    from .run import run_demo

    read_command_line(overrides, argument_types("opsd"))  # a misspelt one is refused before anything is measured
    run_demo(options.output_dir, options.seeds, options.problems, options.samples, overrides)
