# SPDX-License-Identifier: Apache-2.0
"""Training through `accelerate launch`, as the `trl` command does it; without launcher options, in this process."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..errors import UsageError
from .arguments import CommandLine, read_command_line, split_options
from .train import argument_types
from .train import main as train
from .user_errors import LAUNCHED, USER_ERROR


def run_training(name: str, arguments: Sequence[str]) -> int | None:
    """Train as a command line says; returns the exit code of launched processes that failed.

    Args:
        name: a method or a baseline.
        arguments: words of the command line; options of `accelerate launch` and `--accelerate_config` start it.

    Raises:
        UsageError: an unknown option or accelerate config, or launcher options in a process already launched.
    """
    line = read_command_line(arguments, argument_types(name))
    if line.launcher:
        return launch(name, line)
    train(name, line.own)


def launch(name: str, line: CommandLine) -> int:
    """Start `python -m trl_opsd.commands.train` under `accelerate launch`; returns its exit code.

    A rank that ends with a user's error leaves the line to this process, which prints one for all ranks. Tracebacks of
    other errors are printed by the ranks themselves; what the launcher would add says nothing more.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            f"This process was launched already, but was told to launch: {' '.join(line.launcher)}. Give these to the "
            "launcher that is running."
        )
    words = launch_words(name, line)
    os.environ[LAUNCHED] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        is_told = failure.exitcode == USER_ERROR
        print(failure.message if is_told else f"trl-opsd {name}: rank {rank}: {failure.message}", file=sys.stderr)
        return failure.exitcode
    except subprocess.CalledProcessError as error:  # of one process, which printed its line itself
        return error.returncode
    finally:
        del os.environ[LAUNCHED]
    return 0


def launch_words(name: str, line: CommandLine) -> list[str]:
    """What `accelerate launch` is given."""
    words: list[str] = []
    for option, given in split_options(line.launcher):
        if option == "accelerate_config":
            value = given[0].partition("=")[2] or " ".join(given[1:])
            words += ["--config_file", accelerate_config_path(value)]
        else:
            words += given
    return [*words, "--module", "trl_opsd.commands.train", name, *line.own]


def accelerate_config_path(name: str) -> str:
    """Path of an accelerate config: a file, a name of this package's, or one of TRL's.

    Raises:
        UsageError: it is none of them; lists the names.
    """
    if Path(name).is_file():
        return name
    folders = [Path(str(files(package))) / "accelerate_configs" for package in ("trl_opsd", "trl")]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return str(folder / f"{name}.yaml")
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UsageError(f"--accelerate_config {name}: neither a file nor one of {', '.join(names)}.")
