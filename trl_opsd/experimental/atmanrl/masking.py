# SPDX-License-Identifier: Apache-2.0
"""Answers read under a mask on the attention to their reasoning, and the search for the mask that they need.

The mask stands between the tail of a rollout and its reasoning, so prompt and reasoning are read once, without a gradient, and
every step of the search reads only the tail on their keys and values.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ...losses.saliency import lifted, saliency, saliency_objective
from ...model.heads import cache_argument, cache_of, causal_lm
from ...teacher.forwards import can_expand, expand_cache
from ...teacher.prompts import left_pad, positions_from_mask
from .cutting import CutRollout
from .settings import SaliencySettings

_MOST_OFF = 0.1  # nats; bfloat16 rounds by less, and a window or a mask that is not read are off by more


class Found(NamedTuple):
    """What a search found of each row: masks by row, and saliencies and answers' losses in nats (B,)."""

    masks: list[torch.Tensor]
    saliency: torch.Tensor
    plain_loss: torch.Tensor
    first_loss: torch.Tensor
    last_loss: torch.Tensor


class MaskedReader:
    """Reads the tails of rollouts under masks.

    Args:
        model: a causal language model with `eager` or `sdpa` attention, in evaluation mode.
        rollouts: B of them.
        pad_id: id of the padding token.
    """

    def __init__(self, model: torch.nn.Module, rollouts: Sequence[CutRollout], pad_id: int):
        self.model = causal_lm(model)
        weight = self.model.get_input_embeddings().weight
        device, self.dtype = weight.device, weight.dtype
        ids, mask = left_pad([rollout.prompt + rollout.reasoning for rollout in rollouts], pad_id)
        self.ids, self.mask = ids.to(device), mask.to(device)
        sizes = [len(rollout.reasoning) for rollout in rollouts]
        self.is_reasoning = torch.stack([_last(self.ids.size(1), size) for size in sizes]).to(device)
        tails = [torch.tensor(rollout.tail) for rollout in rollouts]
        self.tails = pad_sequence(tails, batch_first=True, padding_value=pad_id).to(device)
        answers = [torch.tensor(rollout.is_answer[1:]) for rollout in rollouts]
        self.is_answer = pad_sequence(answers, batch_first=True).to(device)
        steps = torch.arange(self.tails.size(1), device=device)
        self.positions = self.mask.sum(dim=1, keepdim=True) + steps
        self.hidden = self._hidden_keys(steps)
        self.cache = self._cache()

    def log_probs(self, values: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, A - 1) of the tails' tokens behind their first, under masks (B, S) of prompts and reasonings."""
        shown = values.to(self.dtype)[:, None, None] * self.is_reasoning[:, None, None]
        scores = torch.nn.functional.pad(shown, (0, self.tails.size(1))) + self.hidden
        cache = expand_cache(self.cache, torch.arange(len(self.ids), device=self.ids.device))
        logits = self._forward(self.tails, scores, self.positions, **{cache_argument(self.model): cache}).logits
        return _chosen(logits[:, :-1], self.tails[:, 1:])

    def plain_log_probs(self) -> torch.Tensor:
        """As `log_probs` without a mask, from one ordinary forward over everything."""
        ids, ones = torch.cat([self.ids, self.tails], dim=1), torch.ones_like(self.tails)
        mask = torch.cat([self.mask, ones], dim=1)
        with torch.no_grad():
            logits = self._forward(ids, mask, positions_from_mask(mask), logits_to_keep=self.tails.size(1)).logits
        return _chosen(logits[:, -self.tails.size(1) : -1], self.tails[:, 1:])

    def check(self, start: float) -> None:
        """Check that a mask of zeros is the plain forward and another one is read.

        Raises:
            ValueError: the model does not read an additive mask as it is meant.
        """
        with torch.no_grad():
            plain, open_, shut = self.plain_log_probs(), *map(self.log_probs, self._constants(0.0, start))
        off = (plain - open_)[self.is_answer].abs().max().item()
        if not off <= _MOST_OFF or torch.equal(open_, shut):
            raise ValueError(
                f"model: {self.model.config.model_type} does not read an additive attention mask on its cache as saliency needs it "
                f"(log-probabilities under a mask of zeros are off by {off:.3g} nats, and another mask "
                f"{'changes nothing' if torch.equal(open_, shut) else 'is read'}). Use a model with full attention in every layer."
            )

    def _constants(self, *values: float) -> list[torch.Tensor]:
        wide = torch.promote_types(self.dtype, torch.float32)
        return [torch.full(self.ids.shape, value, dtype=wide, device=self.ids.device) for value in values]

    def _hidden_keys(self, steps: torch.Tensor) -> torch.Tensor:
        """(B, 1, A, S + A): the lowest number at padding and at later tokens, else 0."""
        padding = (self.mask == 0)[:, None].expand(-1, len(steps), -1)
        later = (steps > steps[:, None]).expand(len(self.ids), -1, -1)
        hidden = torch.cat([padding, later], dim=-1)[:, None]
        return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill(
            hidden, torch.finfo(self.dtype).min
        )

    def _cache(self) -> Any:
        with torch.no_grad():
            output = self._forward(
                self.ids, self.mask, positions_from_mask(self.mask), use_cache=True, logits_to_keep=1
            )
        cache = cache_of(output)
        if not can_expand(cache):
            raise ValueError(
                f"model: the cache of {self.model.config.model_type} is {type(cache).__name__}, which holds more than keys and "
                "values. Use a model with full attention in every layer."
            )
        return cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **settings: Any) -> Any:
        taken = inspect.signature(type(self.model).forward).parameters
        if "logits_to_keep" not in taken:
            settings.pop("logits_to_keep", None)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **settings)


def find_masks(reader: MaskedReader, settings: SaliencySettings) -> Found:
    """The masks under which answers stay likely and read little of their reasoning, by gradient descent; rows do not mix."""
    shown = reader.is_reasoning

    def loss(values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return saliency_objective(reader.log_probs(values), reader.is_answer, values, shown, 0.0)

    plain, values = reader._constants(0.0, settings.mask_start)
    plain_loss, first_loss = loss(plain), loss(values)
    for _ in range(settings.mask_steps):
        values.requires_grad_()
        with torch.enable_grad():  # trainers ask for rewards without one
            log_probs = reader.log_probs(values)
            objective = saliency_objective(log_probs, reader.is_answer, values, shown, settings.sparsity).sum()
        (slope,) = torch.autograd.grad(objective, values)
        values = lifted(values.detach(), slope, settings.mask_rate)
    masks = [row[kept] for row, kept in zip(values, shown, strict=True)]
    return Found(masks, saliency(values, shown), plain_loss, first_loss, loss(values))


def _last(size: int, count: int) -> torch.Tensor:
    return torch.arange(size) >= size - count


def _chosen(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
