# SPDX-License-Identifier: Apache-2.0
"""Teacher forwards over jobs: plain, context and rollout together, or shared, rollouts on their contexts' KV cache.

Both give the hidden states that predict each job's rollout; the head is not run. Every forward counts positions over
tokens only; `counted_positions` brings that to forwards that others call.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..losses import OutputHead
from ..model.heads import cache_argument, causal_lm, head_function
from .jobs import ScoringJob, SharedBatch
from .prompts import left_pad, positions_from_mask

Run = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
Scored = tuple[ScoringJob, torch.Tensor]


@dataclass(frozen=True)
class TeacherForward:
    """Runs the teacher and returns hidden states.

    Attributes:
        model: the unwrapped, patched model (see `heads.attach_head_function`).
        forward: what runs it: the model itself or the engine around it.
        observe_head: shown the output head while it is whole.
        wants_head: whether it still has to be; asked at each forward, the same on every rank.
        read: from hidden states (n, H), the head and the tokens (n,) that they predict to some numbers each, two of a view (n, 2),
            which then stand behind the H of every state; None where nothing is read.
    """

    model: torch.nn.Module
    forward: Callable[..., Any]
    observe_head: Callable[[OutputHead], None] = lambda head: None
    wants_head: Callable[[], bool] = lambda: True
    read: Callable[[torch.Tensor, OutputHead, torch.Tensor], torch.Tensor] | None = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states (B, length, H) that predict the last `length` tokens of `ids` (B, S), S > length."""

        def predicting(hidden):
            return hidden[:, -length - 1 : -1]

        return self._states(ids, mask, predicting, ids[:, -length:])[0]

    def contexts(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Hidden states (B, H) at the last of `ids` (B, S), padded on the left, and the cache of all of them."""
        return self._states(ids, mask, lambda hidden: hidden[:, -1], use_cache=True)

    def rollouts(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, first: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, D, H) that predict `ids` (B, D) behind a cache of C tokens.

        Args:
            ids: padded on the right.
            mask: (B, C + D), of both.
            cache: of the contexts.
            first: (B, H), what predicts the first token.
        """

        def predicting(hidden):
            return torch.cat([first.unsqueeze(1), hidden[:, :-1]], dim=1)

        return self._states(ids, mask, predicting, ids, use_cache=True, **{cache_argument(self.model): cache})[0]

    def _states(self, ids, mask, choose, tokens=None, **cache_settings):
        """What `choose` takes of the hidden states, with the numbers of the `tokens` they predict where views are read."""

        def keep(hidden: torch.Tensor, head: OutputHead | None) -> torch.Tensor:
            if head is not None:
                self.observe_head(head)
            hidden = choose(hidden)
            if self.read is None or tokens is None:
                return hidden
            numbers = self.read(hidden.flatten(0, 1), head, tokens.flatten()).view(*tokens.shape, -1)
            return torch.cat([hidden.to(numbers.dtype), numbers], dim=-1)

        positions = positions_from_mask(mask)[:, -ids.size(1) :]
        with head_function(self.model, keep, with_head=self.read is not None or self.wants_head()) as request:
            self.forward(input_ids=ids, attention_mask=mask, position_ids=positions, **cache_settings)
        return request.result, request.cache


def score_plain(run: Run, batch: Sequence[ScoringJob], pad_id: int, device: torch.device) -> Iterator[Scored]:
    """Each job and its hidden states (len(rollout), H), by one forward over contexts and rollouts."""
    contexts, context_mask = left_pad([job.context for job in batch], pad_id)
    rollouts, rollout_mask = _right_pad([job.rollout for job in batch], pad_id)
    ids = torch.cat([contexts, rollouts], dim=1).to(device)
    mask = torch.cat([context_mask, rollout_mask], dim=1).to(device)
    for job, states in zip(batch, run(ids, mask, rollouts.size(1)), strict=True):
        yield job, states[: len(job.rollout)]


def score_shared(run: TeacherForward, batch: SharedBatch, pad_id: int, device: torch.device) -> Iterator[Scored]:
    """Each job and its hidden states (len(rollout), H), by one forward over the contexts and one per chunk.

    Raises:
        NotImplementedError: the model's cache is of a kind whose rows cannot be repeated.
    """
    context_ids, context_mask = (tensor.to(device) for tensor in left_pad(batch.contexts, pad_id))
    last, cache = run.contexts(context_ids, context_mask)
    if not can_expand(cache):
        raise NotImplementedError(f"its cache is {type(cache).__name__}")
    rows = {tuple(context): row for row, context in enumerate(batch.contexts)}
    for chunk in batch.chunks:
        index = torch.tensor([rows[tuple(job.context)] for job in chunk], device=device)
        ids, mask = (tensor.to(device) for tensor in _right_pad([job.rollout for job in chunk], pad_id))
        mask = torch.cat([context_mask[index], mask], dim=1)
        for job, states in zip(chunk, run.rollouts(ids, mask, expand_cache(cache, index), last[index]), strict=True):
            yield job, states[: len(job.rollout)]


def can_expand(cache: Any) -> bool:
    """Whether the cache holds keys and values by row and nothing else."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def expand_cache(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of the given rows, repeated as given; `cache` itself stays as it is."""
    expanded = copy.copy(cache)
    expanded.layers = [copy.copy(layer) for layer in cache.layers]
    expanded.batch_select_indices(rows)
    return expanded


@contextmanager
def counted_positions(forward: torch.nn.Module, model: torch.nn.Module) -> Iterator[None]:
    """Within the context, forwards that are given no positions count tokens only, not the padding on the left.

    Args:
        forward: what is called with `attention_mask` as a keyword: the model itself or the engine around it.
        model: the unwrapped model; one that takes no `position_ids` is left as it is.
    """

    def add_positions(module, args, kwargs):
        return args, {"position_ids": positions_from_mask(kwargs["attention_mask"]), **kwargs}

    if "position_ids" not in inspect.signature(causal_lm(model).forward).parameters:
        yield
        return
    hook = forward.register_forward_pre_hook(add_positions, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(sequences), max(map(len, sequences))), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask
