# SPDX-License-Identifier: Apache-2.0
"""A few processes that run math-verify, started when first needed, each text under a limit that nothing escapes."""

import atexit
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any, NamedTuple

# Processor seconds of one text, where an ordinary one takes some hundredths; what a batch may lose to texts that run
# out; and the limit of those behind.
TEXT_SECONDS, BATCH_SECONDS, SHORT_SECONDS = 5.0, 10.0, 0.25
# More of the clock than of the processor: for a process that waits, on a machine that is busy. Windows has this alone.
_WAITING_SECONDS = 0.0 if os.name == "nt" else 60.0
_MOST_WORKERS = 4


class Verdict(NamedTuple):
    """What came of verifying one text.

    Attributes:
        is_right: None where it was not scored: there is no answer in the reference, or it ran out of time.
        answer: how the text's own answer was read, one name for equal ones; None where it holds none.
        ran_out: whether it hit the limit.
    """

    is_right: bool | None
    answer: str | None = None
    ran_out: bool = False


class Batch:
    """Texts that are being verified; `results` waits for them."""

    def __init__(self, pool: "Pool", pairs: Sequence[tuple[str, str]]):
        self._lost: list[float] = []  # seconds of each text that ran out
        self._pool, self._pairs = pool, pairs
        self._futures: dict[tuple[str, str], Future[Verdict]] = {
            pair: pool.threads.submit(self._verify, *pair) for pair in dict.fromkeys(pairs)
        }

    def results(self) -> list[Verdict]:
        """One verdict a pair, in their order.

        Raises:
            RuntimeError: math-verify cannot be run.
        """
        try:
            return [self._futures[pair].result() for pair in self._pairs]
        except BaseException:  # an interrupt among them; what has not begun would hold up the exit
            for future in self._futures.values():
                future.cancel()
            raise

    def _verify(self, text: str, gold: str) -> Verdict:
        seconds = TEXT_SECONDS if sum(self._lost) < BATCH_SECONDS else SHORT_SECONDS
        verdict = self._pool.verify(text, gold, seconds)
        if verdict.ran_out:
            self._lost.append(seconds)
        return verdict


class Pool:
    """Threads that wait for as many processes; safe to use from any thread."""

    def __init__(self, size: int):
        self._workers = [Worker() for _ in range(size)]
        self._idle: LifoQueue[Worker] = LifoQueue()  # so that a second one starts only when the first is busy
        for worker in self._workers:
            self._idle.put(worker)
        self.threads = ThreadPoolExecutor(size, "verification")

    def verify(self, text: str, gold: str, seconds: float) -> Verdict:
        """Verify one text within a number of processor seconds."""
        worker = self._idle.get()
        try:
            return worker.verify(text, gold, seconds)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()


class Worker:
    """One process, started with its first job and again after it was ended."""

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None
        self._jobs = itertools.count()

    def verify(self, text: str, gold: str, seconds: float) -> Verdict:
        """The verdict on one text."""
        process = self._process = self._process or _start()
        alarm = threading.Timer(seconds + _WAITING_SECONDS, _kill, [process])
        alarm.start()
        try:
            job = {"job": next(self._jobs), "text": text, "gold": gold, "seconds": seconds}
            reply = _ask(process, job)
        except (OSError, ValueError):  # a closed pipe, an empty line: it is gone
            self.close()
            reply = {"job": None}
        finally:
            alarm.cancel()
        if reply["job"] is None:
            return Verdict(None, ran_out=True)
        return Verdict(reply["is_right"], reply["answer"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _start() -> "subprocess.Popen[str]":
    """A process that has loaded math-verify.

    Raises:
        RuntimeError: it has not; says why.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        start_new_session=True,  # an interrupt at the terminal is the parent's to handle
    )
    try:
        reply = _ask(process, [path for path in sys.path if isinstance(path, str)])
        reason = reply.get("error")
    except (OSError, ValueError):
        reason = "it ended at once"
    if reason is not None:
        _end(process)
        raise RuntimeError(
            f"Answers are verified by math-verify in a process of its own, which did not start: {reason}. It is "
            f"`{' '.join(command)}`."
        )
    return process


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process, and the child in which it reads a text."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it was gone
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: "subprocess.Popen[str]") -> None:
    _kill(process)
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # a line that nobody reads any more
            pipe.close()
    process.wait()


def _ask(process: "subprocess.Popen[str]", job: Any) -> dict[str, Any]:
    """Send a line and read the one that answers it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    own = job["job"] if isinstance(job, dict) else None
    while True:
        reply = json.loads(process.stdout.readline())
        # A child that was ended while idle was reported for the job before this one, whose reply may still come.
        if reply.get("job") in (own, None):
            return reply


_pools: dict[int, Pool] = {}  # by process: one that was forked from this has neither its threads nor its pipes


def start(pairs: Sequence[tuple[str, str]]) -> Batch:
    """Begin to verify texts against references: pairs of text and reference."""
    return Batch(_pools.setdefault(os.getpid(), Pool(num_workers())), pairs)


def num_workers() -> int:
    """Processes of this rank: as many as it has cores, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@atexit.register
def _close() -> None:
    pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()
