# SPDX-License-Identifier: Apache-2.0
"""Which exceptions of a command are a sentence to its user, and which are our own bugs and keep their traceback.

A sentence are `UsageError`, every `OSError` (files, the line to the Hub), errors of files' formats, and whatever a `raise`
of this package or of TRL made with one of the classes below: those are checks, which say what to do. A ValueError that
comes out of torch, or out of a call that failed within our code, nobody wrote for the user.
"""

import dis
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .arguments import given_value, read_recipe

# Environment variables, so that launched processes have them too.
TRACEBACK = "TRL_OPSD_TRACEBACK"  # show the traceback in front of the line
LAUNCHED = "TRL_OPSD_LAUNCHED"  # this process's parent is `launch`, which tells what its ranks could not do
USER_ERROR = 2  # exit code
_CHECKS = (ValueError, ImportError, FloatingPointError, RuntimeError)
_PACKAGES = ("trl_opsd", "trl")
_MODELS = ("model_name_or_path", "student_model_name_or_path", "models")
_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed writing")
_FULL_DISK_ADVICE = (
    "the disk is full. Free space or choose another output_dir; checkpoints that were complete before are whole, and "
    "resume_from_checkpoint goes on from the newest."
)


def run_for_user(name: str, words: Sequence[str], function: Callable[[], Any]) -> int:
    """Call the function of a command; a user's error becomes a line on stderr.

    Args:
        name: of the command, for the line.
        words: behind the name, to find the model's files in.
        function: what the command does.

    Returns:
        The exit code: the function's if it is one, 2 after a user's error, else 0.
    """
    try:
        code = function()
    except Exception as error:
        told = sentence_of(error, words)
        if told is None:
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        tell(f"trl-opsd {name}: error: {told}")
        return USER_ERROR
    return code if isinstance(code, int) else 0


def tell(line: str) -> None:
    """Print a line, with the rank where there are several; a process that `launch` started leaves it to its parent."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and os.environ.get(LAUNCHED):
        Path(file).write_text(json.dumps({"message": line}), encoding="utf-8")
        return
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}{line}", file=sys.stderr)


def sentence_of(error: BaseException, words: Sequence[str] = ()) -> str | None:
    """What to tell the user of an exception, on one line; None if it is no user's error."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or any(mark in text for mark in _FULL_DISK):
        return f"{getattr(error, 'filename', None) or text}: {_FULL_DISK_ADVICE}"
    if type(error).__name__ == "SafetensorError":
        return _of_weights(text, words)
    if isinstance(error, UsageError):
        return text
    if isinstance(error, ImportError):
        return text if error.name is None else None  # raised by hand, unlike by an import
    if isinstance(error, OSError):
        return _of_file(error, text) if "couldn't connect" not in text else _of_hub(words)
    return text if isinstance(error, _CHECKS) and _is_a_check(error) else None


def _is_a_check(error: BaseException) -> bool:
    """Whether a `raise` statement of this package or of TRL made the error."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code.co_code
    package = last.tb_frame.f_globals.get("__name__", "").split(".")[0]
    return package in _PACKAGES and code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _of_file(error: OSError, text: str) -> str:
    if error.filename is None or error.strerror is None:
        return text
    advice = {
        errno.EACCES: "Change its rights or choose another place.",
        errno.EROFS: "Choose another place.",
        errno.ENOENT: "Check the path.",
        errno.EEXIST: "It is a file where a folder is needed: choose another place.",
        errno.ENOTDIR: "A part of it is a file where a folder is needed: choose another place.",
    }
    return f"{error.filename}: {error.strerror}. {advice.get(error.errno, '')}".rstrip()


def _of_hub(words: Sequence[str]) -> str:
    models = [given_value(words, name) for name in _MODELS if given_value(words, name)] if words else []
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"{', '.join(models) or 'the model'}: the Hub cannot be reached{offline}, and it is not in its cache here. Check "
        "the name, go online once, or give a folder."
    )


def _of_weights(text: str, words: Sequence[str]) -> str:
    """Name the weights that cannot be read: the error does not."""
    broken = next(broken_weights(words), "a file of weights of the model")
    return (
        f"{broken}: it is cut off or damaged ({text}). Copy or download it again, or name another model or checkpoint."
    )


def broken_weights(words: Sequence[str]) -> Iterator[Path]:
    """Files of weights whose header cannot be read, in the folders that a command line or its recipe names."""
    from safetensors import SafetensorError, safe_open

    named = [word.rpartition("=")[2] for word in words]
    recipes = [after for word, after in pairwise(words) if word == "--config"]
    named += [str(value) for recipe in recipes for value in read_recipe(recipe).values()]
    for folder in dict.fromkeys(name for name in named if len(name) < 4096 and Path(name).is_dir()):
        for path in sorted(Path(folder).rglob("*.safetensors")):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError:
                yield path
