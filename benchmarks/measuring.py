# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: seconds and peak memory of a call, where it ran, rows as JSON lines."""

import ctypes
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Sample(NamedTuple):
    """One call: its seconds, its peak in bytes above what was held before (NaN where the system does not tell)."""

    seconds: float
    peak_bytes: float
    result: Any


def measure(run: Callable[[], Any], device: str) -> Sample:
    """Run once, on a device that has nothing left to do."""
    before = reset_peak(device)
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Sample(seconds, peak(device) - before, result)


def reset_peak(device: str) -> float:
    """Set the peak to what is held now, and return that in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        give_back_free_memory()
        reset_resident_peak()
    return peak(device)


def peak(device: str) -> float:
    """Most bytes held since the last reset: of allocations on a GPU, of resident memory on a CPU (Linux, else NaN)."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()


def give_back_free_memory() -> None:
    """Return what the C library keeps of freed memory to the system, where that is glibc."""
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_resident_peak() -> None:
    """Set the kernel's high-water mark of this process to what is resident now; Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> float:
    """The kernel's high-water mark of this process's resident memory in bytes, or NaN."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), math.nan)


class PhasePeaks:
    """Peaks of memory by phase, above what was held when this was made."""

    def __init__(self, device: str):
        gc.collect()
        self.device, self.phases, self.phase = device, {}, "start"
        self.start_bytes = reset_peak(device)

    def enter(self, phase: str) -> None:
        """End the phase that runs and begin another."""
        held = peak(self.device) - self.start_bytes
        self.phases[self.phase] = max(self.phases.get(self.phase, 0), held)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_resident_peak()
        self.phase = phase


@contextmanager
def limited_memory(device: str) -> Iterator[None]:
    """On a CPU under Linux, an allocation that the free memory cannot hold fails here, and kills no process."""
    meminfo = Path("/proc/meminfo")
    if device == "cuda" or not meminfo.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    resource.setrlimit(resource.RLIMIT_AS, (held + int(0.95 * 1024 * int(line.split()[1])), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on either device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def summary(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Median, least and most seconds and the largest peak in MB; None for what was not measured."""
    if not samples:
        return dict.fromkeys(("median_s", "min_s", "max_s", "peak_extra_mb"))
    seconds = [sample.seconds for sample in samples]
    largest = max(sample.peak_bytes for sample in samples)
    return {
        "median_s": round(statistics.median(seconds), 6),
        "min_s": round(min(seconds), 6),
        "max_s": round(max(seconds), 6),
        "peak_extra_mb": None if math.isnan(largest) else round(largest / 2**20, 2),
    }


@cache
def machine(device: str) -> dict[str, Any]:
    """Where a row was measured and with which libraries."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, trl {version('trl')}",
    }


def emit(rows: Sequence[dict[str, Any]], output: Path | None) -> None:
    """Print rows as JSON lines, and append them to `output` where it is given."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    print(lines, end="", flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(lines)
