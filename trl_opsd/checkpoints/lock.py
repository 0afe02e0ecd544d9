# SPDX-License-Identifier: Apache-2.0
"""One run at a time writes into a folder.

The run's first process leaves a file there with its host and process, and touches it every few seconds. A process of
this host can be asked for; one of another host is taken for gone when its file is not touched for a while.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

FILE = "_trl_opsd.lock"  # HF Trainer does not upload names that begin so
_SECONDS_BETWEEN_TOUCHES, _SECONDS_TO_WATCH = 10.0, 60.0


@contextmanager
def only_run_in(
    folder: str | Path,
    *,
    takes: bool = True,
    of_all: Callable[[Any], list] = lambda value: [value],
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Within the context no other run may train into `folder`.

    Args:
        folder: the run's output directory.
        takes: this rank takes the lock; one of all.
        of_all: from a rank's value, the list of all ranks' values; a collective.
        tell: is given a sentence about a lock that was taken over.

    Raises:
        ValueError: another run is training into it; on every rank.
    """
    lock = Path(folder) / FILE
    refusal = next(filter(None, of_all(_take(lock, tell) if takes else None)), None)
    if refusal:
        raise ValueError(refusal)
    ended = threading.Event()
    if takes:
        threading.Thread(target=_touch, args=(lock, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        owner = _read(lock) if takes else None
        if owner is not None and (owner["host"], owner["pid"]) == (_host(), os.getpid()):
            lock.unlink(missing_ok=True)


def _take(lock: Path, tell: Callable[[str], None]) -> str | None:
    """Write the lock's file; else say why not."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError), lock.open("x", encoding="utf-8") as file:
                json.dump(_owner(), file)
                return None
            owner = _read(lock)
            if _lives(lock, owner):
                return _refusal(lock, _read(lock) or owner)
            if owner is None or owner["host"] != _host():
                tell(f"{lock} is of a run that no longer writes there ({owner}); this run takes over.")
            lock.unlink(missing_ok=True)
    except OSError as error:
        return f"output_dir={str(lock.parent)!r} cannot be written to: {error}. Set another output_dir."


def _refusal(lock: Path, owner: dict[str, Any] | None) -> str:
    place = f" (process {owner['pid']} on {owner['host']})" if owner else ""
    return f"output_dir={str(lock.parent)!r}: another run is training into this folder{place}. Wait for its end, stop it, or set another output_dir. If no run of yours is there, delete {lock}."


def _owner() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _host() -> str:
    """The host's name, with what tells containers apart that share it: they do not see each other's processes."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _read(lock: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        owner = json.loads(lock.read_text(encoding="utf-8"))
        if isinstance(owner, dict) and {"host", "pid", "started"} <= set(owner):
            return owner
    return None


def _lives(lock: Path, owner: dict[str, Any] | None) -> bool:
    if owner is None or owner["host"] != _host():  # None: perhaps just being written
        return _is_touched(lock)
    try:
        process = psutil.Process(owner["pid"])
        # A later process may have the number; the clock that start times are counted from may be set by seconds.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 5
    except psutil.NoSuchProcess:
        return False


def _is_touched(lock: Path) -> bool:
    """Whether the file's time moves; compared with itself, as clocks of two hosts may differ."""
    first, end = _touched_at(lock), time.monotonic() + _SECONDS_TO_WATCH
    while time.monotonic() < end:
        time.sleep(min(1.0, _SECONDS_TO_WATCH / 10))
        if _touched_at(lock) != first:
            return lock.exists()
    return False


def _touched_at(lock: Path) -> int | None:
    with suppress(OSError), lock.open("rb") as file:  # a network file system looks anew when a file is opened
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _touch(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(_SECONDS_BETWEEN_TOUCHES):
        with suppress(OSError):
            os.utime(lock)
