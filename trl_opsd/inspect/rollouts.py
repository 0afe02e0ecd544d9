# SPDX-License-Identifier: Apache-2.0
"""Where inspected rollouts come from: sampled afresh, or the completions that a run saved."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..rewards import accuracy_reward
from ..rows.texts import Prompt
from ..teacher.contexts import Rollout
from .compute import PLAIN, Inspector, student_prompt
from .records import SampledRollout


def sample_groups(inspector: Inspector, rows: Sequence[dict]) -> Iterator[list[SampledRollout]]:
    """Rollouts of the student on each row, as a run samples them: one, or a group where the method reads others.

    Args:
        inspector: whose student, tokenizer and sampling settings are used.
        rows: with `prompt` and, where the method needs it, `solution`.
    """
    settings, tokenizer = inspector.settings, inspector.tokenizer
    size = settings.num_generations if inspector.method.needs_group else 1
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for row in rows:
            ids = inspector.encode(Rollout(row["prompt"], None, ""), PLAIN)
            sequences = _generate(inspector.student, ids, size, settings, tokenizer.pad_token_id)
            yield [
                _sampled(row["prompt"], row.get("solution"), _until_eos(inspector, sequence), tokenizer)
                for sequence in sequences
            ]


def saved_groups(inspector: Inspector, path: str | Path, rows: Sequence[dict] | None) -> Iterator[list[SampledRollout]]:
    """Rollouts of a file, those of one prompt and step together.

    Args:
        inspector: whose tokenizer turns the saved texts into ids again (the sampled ids are not in the file).
        path: JSONL with `prompt`, `completion` and, where the method needs it, `solution`; a Parquet file as
            `log_completions=True` writes it; or a folder of those, whose last is read.
        rows: dataset rows, where solutions are looked up by prompt if the file holds none.

    Raises:
        ValueError: the file lacks a column, or a solution that the method needs is nowhere.
    """
    settings, tokenizer = inspector.settings, inspector.tokenizer
    file, saved = _read(Path(path))
    known = {_key(student_prompt(row["prompt"], settings)): row for row in rows or ()}
    groups: dict[tuple, list[SampledRollout]] = {}
    for index, line in enumerate(saved):
        if not {"prompt", "completion"} <= line.keys():
            raise ValueError(f"{file}: row {index} has the columns {sorted(line)}; it needs `prompt` and `completion`.")
        row = line if line.get("solution") else known.get(_key(line["prompt"]), line)
        if inspector.method.needs_solution and not row.get("solution"):
            raise ValueError(
                f"{file}: row {index} has no `solution` and its prompt is not in the dataset. Give the run's "
                "dataset_name (and prompt_template, if it had one), or a JSONL file with a `solution` column."
            )
        ids = tokenizer(_text(line["completion"]), add_special_tokens=False)["input_ids"]
        reward = line.get("reward", line.get("accuracy_reward"))
        sampled = _sampled(row["prompt"], row.get("solution"), ids, tokenizer, reward)
        groups.setdefault((line.get("step"), _key(line["prompt"])), []).append(sampled)
    for group in groups.values():
        yield from [group] if inspector.method.needs_group else ([sampled] for sampled in group)


def _generate(model, ids: list[int], size: int, settings: Any, pad_id: int) -> list[list[int]]:
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=pad_id,
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k or 0,
        max_new_tokens=settings.max_completion_length,
        num_return_sequences=size,
    )
    return output[:, len(ids) :].tolist()


def _until_eos(inspector: Inspector, ids: list[int]) -> list[int]:
    config = inspector.student.generation_config
    stops = {inspector.tokenizer.eos_token_id, *np.atleast_1d(config.eos_token_id).tolist()}
    return ids[: next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))]


def _sampled(prompt: Prompt, solution: str | None, ids: list[int], tokenizer, reward=None) -> SampledRollout:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if reward is None:
        (reward,) = accuracy_reward([text], [solution])
    return SampledRollout(Rollout(prompt, solution, text, reward), ids)


def _read(path: Path) -> tuple[Path, list[dict]]:
    if path.is_dir():
        files = sorted([*path.glob("completions_*.parquet"), *path.glob("completions/completions_*.parquet")])
        if not files:
            raise ValueError(f"{path} holds no completions_*.parquet. Train with log_completions=True, or name a file.")
        path = files[-1]
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        return path, read_table(path).to_pylist()
    with path.open(encoding="utf-8") as lines:
        return path, [json.loads(line) for line in lines if line.strip()]


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _key(prompt: Prompt) -> str:
    """Equal for equal prompts, whatever else the messages of a table carry."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[message["role"], message["content"]] for message in prompt])
