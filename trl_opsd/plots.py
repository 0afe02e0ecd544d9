# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run from its log history. Needs matplotlib (`pip install trl-opsd[plots]`)."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"


def require_matplotlib() -> None:
    """Say how to get matplotlib, before work whose picture would fail.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib: pip install 'trl-opsd[plots]'.")


def has_curves(log_history: Sequence[dict[str, Any]]) -> bool:
    """Whether `plot_run` can draw something: matplotlib is installed and a step was logged."""
    return find_spec("matplotlib") is not None and any("divergence" in entry for entry in log_history)


def plot_run(
    log_history: Sequence[dict[str, Any]], path: str | Path, *, before: float | None = None, after: float | None = None
) -> Path:
    """Draw accuracy of the rollouts, divergence and completion length over the steps of a run.

    Args:
        log_history: `trainer.state.log_history`.
        path: of the picture; its suffix chooses the format, .png or .svg.
        before: held-out accuracy of the base model in [0, 1], drawn at the first step.
        after: of the trained model, drawn at the last.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    entries = [entry for entry in log_history if "divergence" in entry]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    accuracy, divergence, length = figure.subplots(1, 3)
    _line(accuracy, entries, "reward", "rollouts while training", _BLUE)
    if before is not None and after is not None and entries:
        steps = [0, entries[-1]["step"]]
        accuracy.plot(steps, [before, after], "D", color=_BLACK, label="held-out, before and after")
    accuracy.set(title="Accuracy", ylim=(0, 1))
    _line(divergence, entries, "divergence", "unclipped divergence", _ORANGE)
    _line(divergence, entries, "entropy_gap", "entropy, student - target", _GREEN, style="--")
    divergence.set(title="Divergence and entropy gap (nats per token)")
    divergence.set_ylim(bottom=min(0, divergence.get_ylim()[0]))
    _line(length, entries, "completions/mean_length", "mean length", _BLUE)
    length.set(title="Completion length (tokens)")
    length.set_ylim(bottom=0)
    for axes in (accuracy, divergence, length):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _line(axes, entries, name: str, label: str, color: str, style: str = "-") -> None:
    points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=color, label=label)
