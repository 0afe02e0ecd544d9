# SPDX-License-Identifier: Apache-2.0
"""What `trl-opsd plan` is asked: engines, lengths of texts, its options. Loads no torch, so that help answers at once."""

from ..experimental.planning.workload import ENGINES, Workload
from ..pages import PAGES
from .arguments import CommandParser


def make_parser() -> CommandParser:
    """The options of the command; all other words are the training command's."""
    parser = CommandParser(
        prog="trl-opsd plan",
        usage="trl-opsd plan --model_name_or_path NAME [--method METHOD] [--num_gpus N] [--SETTING VALUE ...]",
        description="Print what a run needs on each GPU, whether it fits, and the nearest setting with which it does. "
        "The model is read as its config alone: a Hub id, a folder, or one of the shapes of docs/scale.md.",
    )
    parser.add_argument("--method", choices=[*PAGES], default="opsd", help="whose run it is")
    parser.add_argument("--num_gpus", type=int, help="default: what the accelerate file says, or 1")
    parser.add_argument("--accelerate_config", help=f"one of {', '.join(ENGINES)}, or a file of accelerate")
    parser.add_argument("--gpu_gib", type=float, default=80, help="memory of one GPU")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="what is computed in")
    parser.add_argument("--prompt_tokens", type=int, default=Workload.prompt, help="longest prompt")
    parser.add_argument("--solution_tokens", type=int, default=Workload.solution, help="longest solution")
    parser.add_argument(
        "--write-docs", nargs="?", const="docs/scale.md", metavar="PAGE", help="write the tables of a page, then stop"
    )
    return parser
