# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run from its log history. Needs matplotlib (`pip install trl-opsd[plots]`)."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
_RUNS = tuple(zip((_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", _BLACK), "os^DvPX", strict=True))

# Title, unit, and the logged numbers of each panel with their line styles and labels.
_PANELS = (
    ("Accuracy of the rollouts", "mean reward", (("reward", "-", None),)),
    (
        "Divergence and loss",
        "nats per token (GRPO's loss has no unit)",
        (("divergence", "-", "unclipped divergence"), ("loss", "--", "loss, clipped where a clip is set")),
    ),
    ("Entropy gap", "nats per token, student - target", (("entropy_gap", "-", None),)),
    ("Completion length", "tokens", (("completions/mean_length", "-", None),)),
    ("Reflection markers", "per 1,000 tokens", (("reflection_markers_per_1000", "-", None),)),
    ("Repetition", "share of repeated 4-grams", (("completions/repetition", "-", None),)),
)


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
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _line(axes, entries, name: str, label: str | None, color: str, marker: str = "", style: str = "-") -> None:
    points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), linestyle=style, color=color, marker=marker, markersize=4, label=label)


def plot_folders(runs: Sequence[str | Path], path: str | Path) -> Path:
    """Draw what the trainers of one or several runs logged, a panel a quantity and a colour and marker a run.

    Args:
        runs: output folders, checkpoints, or `trainer_state.json` files.
        path: of the picture; its suffix chooses the format, .png or .svg.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is another, or a run has logged none of the quantities; one that lacks some is drawn
            where it has them.
    """
    require_matplotlib()
    from matplotlib.lines import Line2D

    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"output={str(path)!r} is not a picture that can be drawn; end it with .png or .svg.")
    histories = {name: read_history(run) for name, run in _named(runs).items()}
    figure, panels = _grid()
    for index, history in enumerate(histories.values()):
        for axes, (_, _, lines) in zip(panels, _PANELS, strict=True):
            for key, style, _ in lines:
                _line(axes, history, key, None, *_RUNS[index % len(_RUNS)], style=style)
    for axes, (_, _, lines) in zip(panels, _PANELS, strict=True):
        if not axes.lines:
            axes.text(0.5, 0.5, "not in these logs", ha="center", va="center", transform=axes.transAxes)
        elif lines[0][0] != "entropy_gap":
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    styles = [Line2D([], [], color=_BLACK, linestyle=style, label=label) for _, style, label in _PANELS[1][2]]
    panels[1].legend(handles=styles, fontsize=8, frameon=False)
    colours = [
        Line2D([], [], color=color, marker=marker, label=name)
        for name, (color, marker) in zip(histories, _RUNS * len(histories), strict=False)
    ]
    figure.legend(handles=colours, loc="outside lower center", ncols=min(4, len(colours)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def read_history(run: str | Path) -> list[dict[str, Any]]:
    """The training log of a run: of its folder or, if that is further on, of its last checkpoint.

    Raises:
        ValueError: there is none, or no step was logged.
    """
    run = Path(run)
    files = [run] if run.is_file() else [*run.glob("trainer_state.json"), *run.glob("checkpoint-*/trainer_state.json")]
    states = [_read_state(file) for file in files]
    if not states:
        raise ValueError(f"{run} holds no trainer_state.json, nor does a checkpoint in it. Give a run's output_dir.")
    history = max(states, key=lambda state: state["global_step"])["log_history"]
    drawn = {key for _, _, lines in _PANELS for key, _, _ in lines}
    entries = [entry for entry in history if drawn & entry.keys()]
    if not entries:
        raise ValueError(f"{run} has logged no step: none of {', '.join(sorted(drawn))} is in its log.")
    return entries


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}). Name a run's output_dir or its trainer_state.json.") from error
    if not isinstance(state, dict) or not {"global_step", "log_history"} <= state.keys():
        raise ValueError(f"{file} is no trainer_state.json. Name a run's output_dir.")
    return state


def _grid():
    """The figure and its panels, titled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for axes, (title, unit, _) in zip(panels, _PANELS, strict=True):
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
    return figure, panels


def _named(runs: Sequence[str | Path]) -> Mapping[str, Path]:
    """Runs by the shortest name that tells them apart: the folder's, or the whole path."""
    paths = [Path(run) for run in dict.fromkeys(map(str, runs))]
    names = [(path.parent if path.is_file() else path).resolve().name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else map(str, paths), paths, strict=True))
