# SPDX-License-Identifier: Apache-2.0
"""The command `trl-opsd`: a table of commands, each a function of the words behind its name.

Only the chosen command's module is imported, so that help does not wait for torch.
"""

import os
import sys
from importlib import import_module
from typing import Any

from ..errors import UsageError
from ..pages import PAGES
from .terminal import VERBOSE, calm_libraries
from .user_errors import TRACEBACK, run_for_user

_TRAINING = "commands.launch:run_training"
BASELINES = {
    "sft": "baseline: TRL's SFT on the solutions of the same rows",
    "grpo": "baseline: TRL's GRPO on the same rows, answers verified",
}
# name -> help, and where in the package the function is that takes the words behind the name.
COMMANDS = {
    **{name: (f"train: {page.help}", _TRAINING) for name, page in PAGES.items()},
    **{name: (text, _TRAINING) for name, text in BASELINES.items()},
    "dry-run": (
        "show what a recipe would do: prompts, ids, batch, steps, mismatches; loads no weights",
        "commands.dry_run.run:run",
    ),
    "eval": (
        "sample, verify and compare models: avg@k, pass@k, majority@k, paired differences",
        "commands.eval.run:run",
    ),
    "build": ("make SFT data by sampling: mixsd, spd", "builders.cli:run"),
    "inspect": (
        "write an HTML page of what the teacher says of each token of some rollouts",
        "inspect.run:run_inspect",
    ),
    "plot": ("draw the curves of one or several runs", "commands.plot:run_plot"),
    "plan": ("print what a run needs on each GPU and whether it fits", "commands.plan:main"),
    "demo": ("train the embedded model and print what it gained", "demo.cli:run"),
    "env": ("print the versions for a bug report", "commands.env:run_environment"),
}
TAKE_SETTINGS = ("dry-run", "inspect", "plan")  # of training, beside their own


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `trl-opsd` command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *rest = words
    for word, variable in (("--traceback", TRACEBACK), ("--verbose", VERBOSE)):
        if word in rest:
            os.environ[variable] = "1"
            rest = [other for other in rest if other != word]
    calm_libraries()
    return run_for_user(name, rest, lambda: run_command(name, rest))


def run_command(name: str, rest: list[str]) -> Any:
    """Run one command; training ones take their name as the first argument, as one function serves them all."""
    if name not in COMMANDS:
        raise UsageError(unknown_command(name))
    if sum(word.partition("=")[0] == "--config" for word in rest) > 1:
        rest = import_module(".arguments", __package__).join_recipes(rest)
    if name in (*PAGES, *BASELINES):
        if "--help_all" in rest:
            import_module(".train", __package__).make_parser(name).print_help()
            return 0
        if {"-h", "--help"} & set(rest):
            print(import_module(".help_text", __package__).training_help(name))
            return 0
        rest = [name, rest]
    else:
        if name in TAKE_SETTINGS and {"-h", "--help"} & set(rest):
            print(import_module(".help_text", __package__).command_help(name, rest))
            return 0
        rest = [rest]
    module, function = COMMANDS[name][1].split(":")
    return getattr(import_module(f"trl_opsd.{module}"), function)(*rest)


def overview() -> str:
    """What `trl-opsd --help` prints."""
    lines = [f"  {name:15}{text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-opsd COMMAND [OPTIONS]",
            "",
            "On-policy self-distillation on TRL.",
            "",
            "commands:",
            *lines,
            "",
            "`trl-opsd COMMAND --help` explains one. A first run: `trl-opsd demo`. An error is a line and exit code 2;",
            "`--traceback` shows where it came from, and `--verbose` every number, bar and warning of a run.",
        ]
    )


def unknown_command(name: str) -> str:
    """What to say of a command that does not exist."""
    from .arguments import nearest_name

    near = nearest_name(name, COMMANDS)
    return f"no such command.{f' Did you mean `{near}`?' if near else ''} Commands: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    sys.exit(main())
