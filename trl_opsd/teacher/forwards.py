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
from ..model.heads import causal_lm, head_function
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
    """

    model: torch.nn.Module
    forward: Callable[..., Any]
    observe_head: Callable[[OutputHead], None] = lambda head: None
    wants_head: Callable[[], bool] = lambda: True

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states (B, length, H) that predict the last `length` tokens of `ids` (B, S), S > length."""
        return self._states(ids, mask, slice(-length - 1, -1))[0]

    def contexts(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Hidden states (B, H) at the last of `ids` (B, S), padded on the left, and the cache of all of them."""
        states, cache = self._states(ids, mask, slice(-1, None), use_cache=True)
        return states[:, 0], cache

    def rollouts(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states (B, D, H) at `ids` (B, D) behind a cache of C tokens; `mask` (B, C + D) covers both."""
        return self._states(ids, mask, slice(None), use_cache=True, past_key_values=cache)[0]

    def _states(self, ids, mask, columns, **cache_settings):
        def keep(hidden: torch.Tensor, head: OutputHead | None) -> torch.Tensor:
            if head is not None:
                self.observe_head(head)
            return hidden[:, columns]

        positions = positions_from_mask(mask)[:, -ids.size(1) :]
        with head_function(self.model, keep, with_head=self.wants_head()) as request:
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
        hidden = run.rollouts(ids, torch.cat([context_mask[index], mask], dim=1), expand_cache(cache, index))
        for job, first, states in zip(chunk, last[index], hidden, strict=True):
            yield job, torch.cat([first[None], states[: len(job.rollout) - 1]])


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
