# SPDX-License-Identifier: Apache-2.0
"""Where inspected rollouts come from: sampled afresh, or the completions that a run saved."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..rewards import accuracy_reward
from ..rows.texts import Prompt, own_prompt
from ..teacher.contexts import Rollout
from .compute import PLAIN, Inspector, student_prompt
from .records import SampledRollout
from .sampling import end_tokens, sample


def sample_groups(inspector: Inspector, rows: Sequence[dict]) -> Iterator[list[SampledRollout]]:
    """Rollouts of the student on each row, as a run samples them: one, or a group where the method reads others.

    Args:
        inspector: whose student, tokenizer and sampling settings are used.
        rows: with `prompt` and, where the method needs it, `solution`.
    """
    settings = inspector.settings
    size = settings.num_generations if reads_groups(inspector) else 1
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for row in rows:
            ids = inspector.encode(Rollout(row["prompt"], None, ""), PLAIN)
            sequences = sample(inspector.student, ids, size, settings, inspector.tokenizer)
            yield [_sampled(row, sequence, inspector) for sequence in sequences]


def reads_groups(inspector: Inspector) -> bool:
    """Whether the rollouts of a prompt belong together: the method reads them, or TRL's advantages do."""
    return inspector.method.needs_group or inspector.settings.reward_weight > 0


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
        found = known.get(_key(line["prompt"]), {})
        row = {**found, **line} if line.get("solution") else found or line
        if inspector.method.needs_solution and not row.get("solution") and own_prompt(row) is None:
            raise ValueError(
                f"{file}: row {index} has no `solution` and its prompt is not in the dataset. Give the run's "
                "dataset_name (and prompt_template, if it had one), or a JSONL file with a `solution` column."
            )
        ids = tokenizer(_text(line["completion"], f"{file}: row {index}"), add_special_tokens=False)["input_ids"]
        reward = line.get("reward", line.get("accuracy_reward"))
        sampled = _sampled(row, ids, inspector, reward)
        groups.setdefault((line.get("step"), _key(line["prompt"])), []).append(sampled)
    for group in groups.values():
        yield from [group] if reads_groups(inspector) else ([sampled] for sampled in group)


def _sampled(row: dict, ids: list[int], inspector: Inspector, reward: float | None = None) -> SampledRollout:
    text, solution = inspector.tokenizer.decode(ids, skip_special_tokens=True), row.get("solution")
    missing = [name for name in inspector.method.needed_columns(inspector.settings) if name not in row]
    if missing:
        raise ValueError(
            f"{inspector.method.name} reads the columns {missing}; give a dataset or a file that has them."
        )
    if reward is None:
        (reward,) = accuracy_reward([text], [solution])
    finished = bool(ids) and ids[-1] in end_tokens(inspector.student, inspector.tokenizer)
    inspector.privileged.check_row(row, "a row")
    columns = inspector.privileged.columns_of(row)
    return SampledRollout(Rollout(row["prompt"], solution, text, reward, len(ids), finished, columns), ids)


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


def _text(completion: str | list[dict], place: str) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) > 1 or completion[0].get("tool_calls"):
        raise ValueError(
            f"{place} is a rollout of several turns, with calls of tools. Its text does not say which tokens the model wrote, so "
            "it cannot be inspected; leave such rows out. A run shows them in its completions table."
        )
    return completion[0]["content"]


def _key(prompt: Prompt) -> str:
    """Equal for equal prompts, whatever else the messages of a table carry."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[message["role"], message["content"]] for message in prompt])
