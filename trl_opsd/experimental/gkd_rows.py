# SPDX-License-Identifier: Apache-2.0
"""Datasets of TRL's GKD, conversations that end with an answer, as batches of it that carry what the teacher reads.

Differences to TRL's `DataCollatorForChatML`:
1. The prompt's ids are those of the other trainers, with `chat_template_kwargs`; it is never cut.
2. The answer is its text and the end token, as a rollout would say it, whatever a template puts around it.
3. Each row's question and `solution` go along.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..rows.checks import CHECKS_VERSION, check_rows
from ..rows.passes import check_all_rows
from ..rows.texts import as_text_turns, fill_template, message_text, rewrite_last_turn
from ..teacher.contexts import TeacherContext
from ..teacher.prompts import TeacherCollator, left_pad

IGNORED = -100


def split_messages(rows: Iterable[Mapping[str, Any]], name: str, start: int = 0) -> Iterator[dict[str, Any]]:
    """`prompt`, `answer` and `solution` of rows with `messages` and `solution`, of which the first has the index `start`.

    Raises:
        ValueError: a row has no conversation that ends with an assistant's text behind a user's; names the row.
    """
    for index, row in enumerate(rows, start):
        messages = row.get("messages") if isinstance(row, Mapping) else None
        is_list = isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)
        if not is_list or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ValueError(
                f"{name} row {index}: `messages` is {str(messages)[:80]!r}, not a conversation that ends with an "
                "assistant's turn behind a user's. Give one, or use OPSDTrainer, which takes `prompt` and `solution`."
            )
        *prompt, answer = messages
        text = message_text(answer, f"{name} row {index}: `messages`")
        yield {"prompt": prompt, "answer": text, "solution": row.get("solution")}


def check_messages(dataset: Any, name: str) -> None:
    """Check the columns and rows of a dataset; of a streamed one the first row.

    Raises:
        ValueError: it is empty, lacks a column, or a row is malformed; the message says what to do.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_messages(part, f"{name}[{key!r}]")
        return
    if not hasattr(dataset, "column_names"):
        raise ValueError(f"{name} is a {type(dataset).__name__}; make a dataset of it with `Dataset.from_list`.")
    if next(iter(dataset), None) is None:
        raise ValueError(f"{name} is empty. Give it at least one row with `messages` and `solution`.")
    for column in ("messages", "solution"):
        if dataset.column_names is not None and column not in dataset.column_names:
            raise ValueError(
                f"{name} has no `{column}` column (it has {dataset.column_names}). `messages` is the conversation with "
                "the answer last, `solution` what the teacher reads; to have it read the answer, add "
                "`dataset.map(lambda row: {'solution': row['messages'][-1]['content']})`."
            )
    if not hasattr(dataset, "__len__"):
        check_rows(split_messages(islice(dataset, 1), name), name, needs_solution=True)
        return
    dataset = dataset.select_columns(["messages", "solution"])
    check_all_rows(
        dataset,
        lambda rows, start: check_rows(split_messages(rows, name, start), name, needs_solution=True, start=start),
        key=lambda: f"messages {CHECKS_VERSION}",
        name=name,
    )


@dataclass
class MessagesCollator:
    """Makes the batches that GKDTrainer samples from and trains on.

    Args:
        contexts: renders the student's prompts.
        prompt_template: rewrites the last user message; None takes it as it is.
        max_length: tokens of prompt and answer; the answer loses its end beyond it, the prompt nothing. None for all.
    """

    contexts: TeacherCollator
    prompt_template: str | None = None
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Ids (B, S), masks and labels, padded on the left, and per row the messages of its question and its solution.

        Raises:
            ValueError: a row is malformed, spells out a control token, or `max_length` leaves nothing of an answer.
        """
        parts = list(split_messages(rows, "training batch"))
        checked = ({name: part[name] for name in ("prompt", "solution")} for part in parts)
        check_rows(checked, "training batch", needs_solution=True, special_tokens=self.contexts.special_tokens)
        prompts = [self._prompt_ids(part["prompt"]) for part in parts]
        answers = [self._answer_ids(part["answer"], len(ids)) for part, ids in zip(parts, prompts, strict=True)]
        pad_id = self.contexts.tokenizer.pad_token_id
        prompt_ids, prompt_mask = left_pad(prompts, pad_id)
        ids, mask = left_pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], pad_id)
        labels = torch.full_like(ids, IGNORED)
        for row, answer in enumerate(answers):
            labels[row, -len(answer) :] = ids[row, -len(answer) :]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "prompts": prompt_ids,
            "prompt_attention_mask": prompt_mask,
            "question": [as_text_turns(part["prompt"]) for part in parts],
            "solution": [part["solution"] for part in parts],
        }

    def _prompt_ids(self, prompt: list[dict[str, Any]]) -> list[int]:
        if self.prompt_template is not None:
            prompt = rewrite_last_turn(prompt, lambda text: fill_template(self.prompt_template, prompt=text))
        return self.contexts.encode(prompt, TeacherContext("plain", None)).ids

    def _answer_ids(self, answer: str, prompt_length: int) -> list[int]:
        tokenizer = self.contexts.tokenizer
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if self.max_length is None:
            return ids
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_length={self.max_length} leaves nothing of an answer: its prompt has {prompt_length} tokens, and "
                "prompts are not cut. Raise max_length, set it to None, or drop prompts this long."
            )
        return ids[: self.max_length - prompt_length]
