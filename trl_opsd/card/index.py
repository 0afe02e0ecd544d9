# SPDX-License-Identifier: Apache-2.0
"""The numbers of a model as `model-index` in its card's metadata, which the Hub shows as metrics beside the text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

# Numbers that say how good a model is; the table of the card has the others.
_METRICS = {
    "avg_at_k": ("accuracy", "avg"),
    "pass_at_k": ("pass@k", "pass"),
    "majority_at_k": ("majority@k", "majority"),
}


def eval_results(evaluation: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """What the Hub reads of the numbers of the trained model; the base's are left out, for they are not this model's.

    Args:
        evaluation: see `results_section`; the base is first where there is one.
    """
    base = str(evaluation[0]["model"])
    own = [line for line in evaluation if str(line["model"]) != base] or evaluation
    return [_result(line, name) for line in own for name in _METRICS if name in line]


def index_results(path: Path, evaluation: Sequence[Mapping[str, Any]]) -> None:
    """Write `model-index` into the metadata of a card, in place of one that it has; the rest stays as it is.

    Args:
        path: the card, which may have no metadata yet.
        evaluation: see `results_section`.
    """
    metadata = metadata_load(path) or {}
    # huggingface_hub moves `model_name` into the index when it writes a card; a second writing finds it there.
    known = [entry["name"] for entry in metadata.get("model-index", ())]
    name = metadata.pop("model_name", None) or next(iter(known), path.absolute().parent.name)
    metadata["model-index"] = eval_results_to_model_index(name, eval_results(evaluation))
    metadata_save(path, metadata)


def _result(line: Mapping[str, Any], name: str) -> EvalResult:
    kind, shown = _METRICS[name]
    facts = {"num_questions": line["num_questions"], "num_samples": line["num_samples"]}
    if name == "avg_at_k" and line.get("difference") is not None:
        facts["difference_to_base"] = dict(
            zip(("estimate", "low", "high"), map(float, line["difference"]), strict=True)
        )
    dataset = str(line["dataset"])
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w.-]+", "-", dataset),
        dataset_name=dataset,
        metric_type=kind,
        metric_name=f"{shown}@{line['num_samples']}",
        metric_value=float(line[name]),
        metric_args=facts,
    )
