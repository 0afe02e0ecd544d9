# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd METHOD --config recipe.yaml [overrides]` trains; `trl-opsd demo` runs the embedded default.

`trl-opsd inspect` shows a method's signal token by token, `trl-opsd plot` a run's curves.
"""

import argparse
import sys

# Written out, so that --help does not load torch; a test holds it to `train.TRAINERS`.
METHODS = ("opsd", "ogls-sd", "purified-opsd")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `trl-opsd` command."""
    parser = argparse.ArgumentParser(prog="trl-opsd", description="On-policy self-distillation on TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train the embedded model and print what it gained; other options override its recipe"
    )
    demo.add_argument("--output_dir", default="outputs/demo", help="where the model, its card and the plot go")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    demo.add_argument("--problems", type=int, default=300, help="held-out problems")
    demo.add_argument("--samples", type=int, default=4, help="samples a problem, the k of avg@k")
    commands.add_parser("inspect", help="write an HTML page of what the teacher says of each token", add_help=False)
    plot = commands.add_parser("plot", help="draw the curves of one or several runs")
    plot.add_argument("runs", nargs="+", help="output folders, checkpoints or trainer_state.json files")
    plot.add_argument("--output", default="run.png", help="the picture, .png or .svg")
    for method in METHODS:
        commands.add_parser(method, help=f"train with {method}; see `trl-opsd {method} --help`", add_help=False)
    commands.add_parser("plan", help="print what a run needs on each GPU and whether it fits", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "demo":
        from .demo.run import run_demo

        run_demo(options.output_dir, options.seeds, options.problems, options.samples, rest)
    elif options.command == "plan":
        from .plan import main as plan

        plan(rest)
    elif options.command == "inspect":
        from .inspect.command import run_inspect

        run_inspect(rest)
    elif options.command == "plot":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        from .plots import plot_folders

        print(plot_folders(options.runs, options.output))
    else:
        from .train import main as train

        train(options.command, rest)


if __name__ == "__main__":
    sys.exit(main())
