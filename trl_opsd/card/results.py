# SPDX-License-Identifier: Apache-2.0
"""Numbers of base and trained model in a card, and what it says where there are none."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .index import index_results
from .markdown import as_json, escaped, table

NUMBERS = {
    "avg_at_k": "avg@k",
    "pass_at_k": "pass@k",
    "majority_at_k": "majority@k",
    "mean_completion_length": "mean completion length in tokens",
    "cut_share": "share cut at the limit",
    "markers_per_1000_tokens": "reflection markers per 1,000 tokens",
}
_HEADING = "## Results"
_PROCEDURE = "\n## Training procedure"  # of TRL's cards


def results_section(evaluation: Sequence[Mapping[str, Any]] | None) -> str:
    """Markdown of the numbers, or of there being none.

    Args:
        evaluation: a mapping per model and set of questions, the base first: `dataset`, `model`, `num_questions`,
            `num_samples`, numbers of `EvaluationResult` by their names, and optionally `seeds`, `settings` and
            `difference` (estimate, low, high) to the base. `summary.json` of `trl-opsd eval` holds such a list.
    """
    if not evaluation:
        return (
            f"{_HEADING}\n\nNot measured: neither the base nor this model was evaluated when this card was written. "
            "Numbers in the log are of sampled rollouts on training problems."
        )
    names = [name for name in NUMBERS if any(name in line for line in evaluation)]
    head = ["questions", "model", *(NUMBERS[name] for name in names), "difference to the base, 95 % interval"]
    rows = [head, ["---"] * len(head)]
    for line in evaluation:
        difference = line.get("difference")
        shown = "-" if difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
        data = f"{escaped(line['dataset'])}: {line['num_questions']}, k = {line['num_samples']}"
        numbers = [f"{line[name]:.3f}" if name in line else "not measured" for name in names]
        rows.append([data, escaped(str(line["model"])), *numbers, shown])
    settings = {as_json(line["settings"]) for line in evaluation if line.get("settings")}
    seeds = {as_json(line["seeds"]) for line in evaluation if line.get("seeds")}
    notes = [
        f"Verification ran out of time on {line['unscored_share']:.2%} of the completions of {escaped(str(line['model']))} "
        f"on {escaped(line['dataset'])}, which count as wrong."
        for line in evaluation
        if line.get("unscored_share")
    ]
    if len({str(line["model"]) for line in evaluation}) == 1:
        notes.append("The base was not measured beside this model.")
    notes.append(f"Evaluation settings: {'; '.join(sorted(settings)) or 'not recorded'}.")
    notes.append(f"Evaluation seeds: {'; '.join(sorted(seeds)) or 'not recorded'}.")
    return f"{_HEADING}\n\n{table(rows)}\n\n{' '.join(notes)}"


def evaluation_thinking(evaluation: Sequence[Mapping[str, Any]] | None) -> str:
    """The third of the thinking triple: the mode that the numbers were measured in."""
    recorded = {str(line.get("settings", {}).get("thinking", "not recorded")) for line in evaluation or ()}
    return ", ".join(sorted(recorded)) or "not measured"


def add_results(folder: str | Path, evaluation: Sequence[Mapping[str, Any]]) -> None:
    """Put numbers measured later into the text and the metadata of a saved model's card, in place of those it has.

    Args:
        folder: holds the model and its README.md. One that TRL wrote, as of a baseline, gets a section of results in
            front of the training procedure.
        evaluation: see `results_section`.
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8")
    before, found, after = text.partition(f"\n{_HEADING}\n")
    if found:
        after = after[after.find("\n## ") :] if "\n## " in after else "\n"
    else:
        before, procedure, after = text.partition(_PROCEDURE)
        before, after = f"{before.rstrip()}\n", procedure + after
    rest = re.sub('"evaluation": "[^"]*"', f'"evaluation": "{evaluation_thinking(evaluation)}"', after, count=1)
    path.write_text(f"{before}\n{results_section(evaluation)}\n{rest}", encoding="utf-8")
    index_results(path, evaluation)
