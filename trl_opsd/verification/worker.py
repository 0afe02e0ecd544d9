# SPDX-License-Identifier: Apache-2.0
"""What runs in a verification process: jobs come in and replies go out, a JSON line each.

Run as a file, with the standard library and math-verify alone: neither this package, torch nor the user's script is
imported again. The process itself never reads a text. It keeps math-verify loaded and forks the child that does, and
forks another when the kernel has ended one for taking too long: no Python signal handler stops a long operation in C.
"""

import json
import logging
import os
import signal
import sys
from functools import lru_cache
from typing import Any, TextIO

_MEMORY = 4 << 30  # bytes of address space; a tower of powers takes all that there is


def main() -> None:
    """Read `sys.path` of the parent, say that math-verify is loaded, and serve until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no reply
    sys.path[:] = json.loads(sys.stdin.readline())
    try:
        judge("\\boxed{\\frac{10}{2}}", "\\boxed{5}")  # the first one builds math-verify's grammar
    except ImportError as error:
        send(replies, {"error": repr(error)})
        return
    send(replies, {"ready": True})
    limit_memory()
    if not hasattr(os, "fork"):
        serve(replies)
        return
    while (pid := os.fork()) != 0:
        if os.waitpid(pid, 0)[1] == 0:  # its input ended
            return
        send(replies, {"job": None})
    serve(replies)


def serve(replies: TextIO) -> None:
    """Answer every job of the input; its own processor seconds are its limit."""
    has_timer = hasattr(signal, "setitimer")
    if has_timer:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    while line := sys.stdin.readline():
        job = json.loads(line)
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, job["seconds"])
        is_right, answer = judge(job["text"], job["gold"])
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, 0)
        send(replies, {"job": job["job"], "is_right": is_right, "answer": answer})


def send(replies: TextIO, reply: dict[str, Any]) -> None:
    """Write one line at once."""
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def judge(text: str, gold: str) -> tuple[bool | None, str | None]:
    """Whether the answers in both texts are equal, None if there is none in `gold`; and how the one in `text` is read."""
    from math_verify import verify

    wanted, found = read_gold(gold), read(text)
    if not wanted or not found:
        return (False if wanted else None), name_of(found)
    try:
        is_right = bool(verify(list(wanted), list(found), timeout_seconds=None))
    except Exception:  # sympy raises many kinds on odd input
        is_right = False
    return is_right, name_of(found)


def read(text: str) -> tuple[Any, ...]:
    """math-verify's readings of the answer in a text, () where it reads none."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        return tuple(parse(text.strip(), parsing_timeout=None))
    except Exception:  # whatever a parser of free text trips over, it found no answer
        return ()


# References alone: many rollouts share one, and a rollout never comes back.
read_gold = lru_cache(maxsize=1024)(read)


def name_of(readings: tuple[Any, ...]) -> str | None:
    """One name for equal readings, by which answers are counted."""
    if not readings:
        return None
    try:
        return str(readings[0])
    except Exception:  # an integer of more digits than Python prints
        return str(readings[-1]) if isinstance(readings[-1], str) else "unprintable"


def limit_memory() -> None:
    """Bound the address space of this process and its children, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
