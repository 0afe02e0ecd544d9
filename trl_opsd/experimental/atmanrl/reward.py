# SPDX-License-Identifier: Apache-2.0
"""The saliency of a right rollout's reasoning as a reward function in TRL's form (AtManRL, arXiv 2604.16158)."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...rewards import make_accuracy_reward
from ...teacher.contexts import TeacherContext
from ...teacher.prompts import TeacherCollator
from .cutting import CutRollout, cut_rollout
from .masking import Found, MaskedReader, find_masks
from .readable import check_readable
from .settings import SaliencySettings

_INFERRED = (
    "The saliency reward is experimental. That the mask stands between the answer and the reasoning, that it is at most 0, its "
    "price, start, step size, and the direction of the reward are inferred: the paper was read through a note, and there is no "
    "code (docs/rewards.md)."
)


def make_saliency_reward(
    model: nn.Module, tokenizer: Any, *, chat_template_kwargs: dict[str, Any] | None = None, **settings: Any
) -> Callable[..., list[float | None]]:
    """A reward function: mean_i exp(m_i) where the answer is right, else 0 (arXiv 2604.16158, partly inferred).

    m is the mask, at most 0, on the answer's attention to the reasoning that keeps the answer likely and reads little.

    Args:
        model: whose attention is read, whole on every rank, with `eager` or `sdpa` attention: the very object that the trainer
            gets, whose weights then are the student's of each moment, or a frozen copy on the device of its own.
        tokenizer: the student's, which renders the prompts.
        chat_template_kwargs: those of the trainer, `tools` included.
        **settings: fields of `SaliencySettings`.

    Raises:
        ValueError: a setting is outside its range, or the model cannot be read so.
    """
    chosen = SaliencySettings(**settings)
    chosen.check()
    check_readable(model)
    warnings.warn(_INFERRED, stacklevel=2)
    reward = _SaliencyReward(model, tokenizer, chat_template_kwargs or {}, chosen)

    def saliency_reward(
        prompts: list, completions: list, completion_ids: list, solution: list | None = None, **columns: Any
    ) -> list[float | None]:
        """The saliency of each rollout whose answer is right, 0 where it is wrong, None where nobody can say."""
        if solution is None:
            raise ValueError(
                "The rows have no column `solution`, without which no answer is right. Add it to train_dataset."
            )
        _check_rows(completions, columns)
        return reward(prompts, completions, completion_ids, solution, columns.get("log_metric"))

    return saliency_reward


def _check_rows(completions: list, columns: dict[str, Any]) -> None:
    roles = {turn.get("role") for completion in completions if isinstance(completion, list) for turn in completion}
    if "environments" in columns or "tool" in roles:
        raise ValueError(
            "The saliency reward reads one answer of the model to one prompt, and these rollouts hold turns of tools or "
            "environments. Use it without `tools` and `environment_factory`."
        )


class _SaliencyReward:
    def __init__(self, model: nn.Module, tokenizer: Any, template_kwargs: dict[str, Any], settings: SaliencySettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.collator = TeacherCollator(tokenizer, {}, student_kwargs=template_kwargs)
        self.is_right = make_accuracy_reward(settings.verifier)
        self.checked = False

    def __call__(self, prompts, completions, completion_ids, solution, log_metric) -> list[float | None]:
        check_readable(self.model)  # engines shard it once the trainer has it
        verdicts = self.is_right(completions, solution)
        rewards = [None if verdict is None else 0.0 for verdict in verdicts]
        right = [row for row, verdict in enumerate(verdicts) if verdict]
        cut = {row: self._cut(prompts[row], completion_ids[row]) for row in right}
        readable = sorted((row for row in right if cut[row]), key=lambda row: len(completion_ids[row]))
        facts = []
        for first in range(0, len(readable), self.settings.rows_at_once):
            rows = readable[first : first + self.settings.rows_at_once]
            found = self._search([cut[row] for row in rows])
            for row, *numbers in zip(rows, *(tensor.tolist() for tensor in found[1:]), strict=True):
                rewards[row] = numbers[0]
                facts.append(numbers)
        if log_metric is not None and right:
            _log(log_metric, facts, 1 - len(facts) / len(right))
        return rewards

    def _cut(self, prompt: Any, completion: list[int]) -> CutRollout | None:
        ids = self.collator.encode(prompt, TeacherContext("plain", None)).ids
        return cut_rollout(
            self.tokenizer, ids, completion, self.settings.answer_marker, self.settings.max_answer_tokens
        )

    def _search(self, rollouts: list[CutRollout]) -> Found:
        with _evaluating(self.model):
            reader = MaskedReader(self.model, rollouts, self.tokenizer.pad_token_id or 0)
            if not self.checked:
                reader.check(self.settings.mask_start)
                self.checked = True
            return find_masks(reader, self.settings)


def _log(log_metric: Callable[[str, float], None], facts: list[list[float]], unread: float) -> None:
    log_metric("saliency/unread", unread)
    names = ("mean", "plain_loss", "first_loss", "last_loss")
    for name, numbers in zip(names, zip(*facts, strict=True), strict=False):
        log_metric(f"saliency/{name}", sum(numbers) / len(numbers))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and checkpointing, which is dropped in evaluation mode; modules come back as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
