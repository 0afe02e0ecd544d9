# SPDX-License-Identifier: Apache-2.0
"""What `trl-opsd eval` makes of its result files: lines, a table with the checkpoint rule under it, cards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .models import GIVEN, LAST, ON_THE_WAY, EvaluatedModel

_SHARES = ("avg_at_k", "pass_at_k", "majority_at_k", "cut_share")
_AVERAGED = (*_SHARES, "mean_completion_length", "markers_per_1000_tokens")


def summarize(
    models: Sequence[EvaluatedModel],
    records: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    datasets: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A line per set and model: numbers averaged over seeds, an interval over questions, the difference to the first.

    Args:
        models: the first is what the others are compared with.
        records: results of all seeds by (model path, set).
        datasets: sets of questions.
        seeds: of the results.
        settings: that they share.
    """
    import numpy as np

    from ...evaluation.measures import bootstrap_interval, paired_difference

    lines = []
    for dataset in datasets:
        first: Sequence[float] | None = None
        for model in models:
            results = records[model.path, dataset]
            scores = np.mean([result["per_question_scores"] for result in results], axis=0).tolist()
            line = {"dataset": dataset, "model": model.path, "checkpoint": model.place, "run": model.given}
            line |= {"seeds": list(seeds), "num_questions": len(scores), "num_samples": settings["num_samples"]}
            line |= {name: float(np.mean([result[name] for result in results])) for name in _AVERAGED}
            line["unscored_share"] = float(np.mean([result.get("unscored_share", 0.0) for result in results]))
            line |= {"avg_per_seed": [result["avg_at_k"] for result in results], "settings": dict(settings)}
            line["interval"] = bootstrap_interval(scores)
            line["difference"] = None if first is None else tuple(paired_difference(scores, first))
            first = scores if first is None else first
            lines.append(line)
    return lines


def table_of(summary: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table, shares as fractions, intervals of 95 % over questions; the rule stands below."""
    k = summary[0]["num_samples"]
    head = ["set", "model", "checkpoint", f"avg@{k}", "95 %", f"pass@{k}", f"maj@{k}", "length", "cut"]
    head += ["markers per 1,000", "difference to first, 95 %"]
    rows = [head, ["---"] * len(head)]
    for line in summary:
        interval = "[{:.3f}, {:.3f}]".format(*line["interval"])
        difference = "-"
        if line["difference"] is not None:
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*line["difference"])
        average, any_right, majority, cut = (f"{line[name]:.3f}" for name in _SHARES)
        names = [line[name].replace("|", "\\|") for name in ("dataset", "model", "checkpoint")]
        length, markers = f"{line['mean_completion_length']:.0f}", f"{line['markers_per_1000_tokens']:.1f}"
        rows.append([*names, average, interval, any_right, majority, length, cut, markers, difference])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *rule_of(summary), *unscored_of(summary)])


def rule_of(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on which checkpoints the lines are of, and the best of a course with what that number is worth."""
    places = {line["checkpoint"] for line in summary}
    sentences = ["Checkpoint rule: every model as it was named."]
    if places != {GIVEN}:
        sentences = [
            "Checkpoint rule: last. A run counts by the model that it saved at its end, or else by its newest complete "
            "checkpoint."
        ]
    if ON_THE_WAY not in places:
        return sentences
    sentences.append("Rows `on the way` are a course, not results.")
    runs = dict.fromkeys((line["dataset"], line["run"]) for line in summary if line["checkpoint"] == ON_THE_WAY)
    for dataset, run in runs:
        course = [line for line in summary if (line["dataset"], line["run"]) == (dataset, run)]
        course = [line for line in course if line["checkpoint"] != GIVEN]
        best = max(course, key=lambda line: line["avg_at_k"])
        sentences.append(
            f"Best of {len(course)} checkpoints of {run} on {dataset}, chosen by these very questions and therefore too "
            f"high: {best['avg_at_k']:.3f} ({Path(best['model']).name}). Do not set it against a number of a fixed "
            "rule."
        )
    return sentences


def unscored_of(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each line of which some completions were not scored."""
    return [
        f"Not scored: verification ran out of time on {100 * line['unscored_share']:.2g} % of the completions of "
        f"{line['model']} on {line['dataset']}; they count as wrong."
        for line in summary
        if line.get("unscored_share")
    ]


def check_cards(models: Sequence[EvaluatedModel]) -> None:
    """See that every model but the first has a card to add numbers to.

    Raises:
        UsageError: names the first that has none, or one whose metadata nobody can read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    for model in models[1:]:
        card = Path(model.given) / "README.md"
        if not card.exists():
            raise UsageError(
                f"--add_to_card: {model.given} has no README.md, as a training command writes it into the folder of a run. "
                "Name the folder of a run, or leave the option out."
            )
        try:
            ModelCard(card.read_text(encoding="utf-8"))
        except (ValueError, YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"--add_to_card: the metadata of {card}, between its first lines `---`, cannot be read ({reason}). "
                "Mend it, or leave the option out."
            ) from error


def add_to_cards(models: Sequence[EvaluatedModel], summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Put base and result into the card of every model but the first; never a row on the way.

    Returns:
        The folders.
    """
    from ...card import add_results

    base, *others = models
    folders = []
    for model in others:
        if model.place == ON_THE_WAY:
            continue
        names = {base.path: _base_name(base.path), model.path: "this model"}
        chosen = [line for line in summary if line["model"] in names]
        rule = LAST if model.place == LAST else model.place
        add_results(
            model.given,
            [
                {
                    **line,
                    "model": names[line["model"]],
                    "dataset": _file_name(line["dataset"]),
                    "settings": {**line["settings"], "checkpoint_rule": rule},
                }
                for line in chosen
            ],
        )
        folders.append(model.given)
    return folders


def _base_name(path: str) -> str:
    """What a card calls the base; no path of this machine."""
    return f"base (folder {Path(path).name})" if Path(path).is_dir() else path


def _file_name(dataset: str) -> str:
    return Path(dataset).name if Path(dataset).exists() else dataset
