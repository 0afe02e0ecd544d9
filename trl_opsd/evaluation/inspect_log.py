# SPDX-License-Identifier: Apache-2.0
"""Sampled answers as a log of inspect-ai, which `inspect view` shows; written by that package's own functions."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import UsageError

SCORER = "trl_opsd"


def check_inspect_ai(place: str) -> None:
    """Check that inspect-ai is installed.

    Raises:
        UsageError: it cannot be imported; starts with `place`.
    """
    try:
        import inspect_ai.log  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{place}: inspect-ai cannot be imported ({error}). Install it with `pip install 'trl-opsd[inspect-ai]'`, or leave the "
            "option out; --samples writes JSONL without it."
        ) from error


def write_inspect_log(path: str | Path, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write a log of one model on one set of questions.

    Args:
        path: ends with `.eval` or `.json`.
        lines: of `samples.sample_lines`, with `model`, `dataset` and `seed`, of any number of seeds.
        settings: of the sampling, which the log holds too.
    """
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSpec, EvalStats, write_eval_log
    from inspect_ai.model import GenerateConfig

    now, first = datetime.now(UTC).isoformat(), lines[0]
    ids = list(dict.fromkeys(line["question"] for line in lines))
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_new_tokens": "max_tokens"}
    spec = EvalSpec(
        created=now,
        run_id=uuid4().hex,
        task_id=uuid4().hex,
        task=Path(first["dataset"]).stem,
        model=first["model"],
        dataset=EvalDataset(name=first["dataset"], samples=len(ids), sample_ids=ids),
        config=EvalConfig(epochs=len(lines) // len(ids)),
        model_generate_config=GenerateConfig(**{theirs: settings[ours] for ours, theirs in names.items()}),
        packages={"trl-opsd": importlib.metadata.version("trl-opsd")},
        metadata=dict(settings),
    )
    log = EvalLog(
        status="success",
        eval=spec,
        results=_results(lines),
        stats=EvalStats(started_at=now, completed_at=now),
        samples=_samples(lines),
    )
    write_eval_log(log, str(path))


def _results(lines: Sequence[Mapping[str, Any]]) -> Any:
    """The mean over all samples; what has no score counts as wrong, as everywhere in an evaluation."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    metrics = {
        "accuracy": sum(line["score"] or 0 for line in lines) / len(lines),
        "mean_length": sum(line["length"] for line in lines) / len(lines),
        "cut_share": sum(line["cut"] for line in lines) / len(lines),
    }
    score = EvalScore(
        name=SCORER,
        scorer=SCORER,
        scored_samples=sum(line["score"] is not None for line in lines),
        unscored_samples=sum(line["score"] is None for line in lines),
        metrics={name: EvalMetric(name=name, value=value) for name, value in metrics.items()},
    )
    return EvalResults(total_samples=len(lines), completed_samples=len(lines), scores=[score])


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Samples of a question are its epochs, counted over seeds."""
    epochs: dict[int, int] = {}
    samples = []
    for line in lines:
        epochs[line["question"]] = epochs.get(line["question"], 0) + 1
        samples.append(_sample(line, epochs[line["question"]]))
    return samples


def _sample(line: Mapping[str, Any], epoch: int) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput, ModelUsage
    from inspect_ai.scorer import CORRECT, INCORRECT, NOANSWER, Score

    asked = _messages(line["prompt"])
    output = ModelOutput.from_content(
        line["model"], line["completion"], stop_reason="max_tokens" if line["cut"] else "stop"
    )
    output.usage = ModelUsage(output_tokens=line["length"], total_tokens=line["length"])
    value = {1: CORRECT, 0: INCORRECT, None: NOANSWER}[line["score"]]
    told = "verification ran out of time" if line["unscored"] else None
    return EvalSample(
        id=line["question"],
        epoch=epoch,
        input=asked if isinstance(line["prompt"], list) else line["prompt"],
        target=line["solution"] or "",
        messages=[*asked, output.message],
        output=output,
        model_usage={line["model"]: output.usage},
        scores={SCORER: Score(value=value, answer=line["answer"], explanation=told)},
        metadata={"seed": line["seed"], "sample": line["sample"], "length": line["length"], "cut": line["cut"]},
    )


def _messages(prompt: str | list[Mapping[str, Any]]) -> list[Any]:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageTool, ChatMessageUser

    kinds = {
        "system": ChatMessageSystem,
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
        "tool": ChatMessageTool,
    }
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [kinds[turn["role"]](content=turn["content"] or "") for turn in turns]
