# SPDX-License-Identifier: Apache-2.0
"""A model that reads a batch of prompts and then one token a row at a time, on a cache of keys and values of its own."""

from collections.abc import Sequence
from typing import Any

import torch

from ..model.heads import cache_argument, cache_of
from ..teacher.prompts import positions_from_mask


class Reader:
    """A conditional distribution of the next token, of every row of a batch.

    Several readers that are told the same tokens share a continuation under different prompts, or different models.

    Attributes:
        logits (`torch.Tensor`): of the next token, (B, V), in float32 or wider.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_token_id: int):
        """Read the prompts, padded on the left.

        Args:
            model: a causal language model in evaluation mode.
            prompts: token ids of each row, one or more.
            pad_token_id: fills the rows; it is masked.
        """
        self.model = model
        width = max(map(len, prompts))
        ids = [[pad_token_id] * (width - len(row)) + list(row) for row in prompts]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
        self._mask = torch.tensor(mask, device=model.device)  # (B, T)
        self._cache: Any = None
        self._forward(torch.tensor(ids, device=model.device), positions_from_mask(self._mask))

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> None:
        """Read one more token of each row.

        Args:
            tokens: ids, (B,); of a row that has ended, any.
        """
        column = tokens.to(self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)
        self._forward(column, positions_from_mask(self._mask)[:, -1:])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        index = torch.tensor(rows, device=self._mask.device)
        self._mask, self.logits = self._mask[index], self.logits[index]
        self._cache.batch_select_indices(index)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        cache = {} if self._cache is None else {cache_argument(self.model): self._cache}
        output = self.model(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, use_cache=True, logits_to_keep=1, **cache
        )
        self._cache = cache_of(output)
        logits = output.logits[:, -1]
        self.logits = logits if logits.dtype == torch.float64 else logits.float()
