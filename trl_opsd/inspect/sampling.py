# SPDX-License-Identifier: Apache-2.0
"""Sequences from a model by `generate`, under the sampling settings of training."""

from typing import Any

import numpy as np
import torch


def sample(model: torch.nn.Module, ids: list[int], size: int, settings: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of `size` answers to a prompt, each up to its end token or the limit.

    Args:
        model: that answers.
        ids: of the prompt.
        size: number of answers.
        settings: reads `temperature`, `top_p`, `top_k` and `max_completion_length`.
        tokenizer: knows the end and the padding token.
    """
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k or 0,
        max_new_tokens=settings.max_completion_length,
        num_return_sequences=size,
    )
    stops = end_tokens(model, tokenizer)
    return [_until(answer, stops) for answer in output[:, len(ids) :].tolist()]


def end_tokens(model: torch.nn.Module, tokenizer: Any) -> set[int]:
    """Ids that end a rollout."""
    return {tokenizer.eos_token_id, *np.atleast_1d(model.generation_config.eos_token_id).tolist()}


def _until(ids: list[int], stops: set[int]) -> list[int]:
    return ids[: next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))]
