# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd env`: the versions that a bug report needs."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__

_PACKAGES = ("torch", "trl", "transformers", "accelerate", "datasets", "peft", "deepspeed", "vllm", "math-verify")


def run_environment(arguments: list[str]) -> None:
    """Print the versions, one a line."""
    lines = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    print(f"Copy this into the report:\n\n{lines}")


def environment() -> dict[str, str]:
    """Platform, versions, commit and accelerators by name."""
    commit = git_commit()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "trl_opsd": f"{__version__}+{commit}" if commit else __version__,
        **{name: installed_version(name) for name in _PACKAGES},
        "accelerators": ", ".join(accelerators()) or "none, CPU only",
    }


def installed_version(package: str) -> str:
    """Version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git_commit() -> str | None:
    """Short hash of the clone this package runs from, with a mark where files differ from it; None without a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def accelerators() -> list[str]:
    """Names of the devices that torch sees."""
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else []
