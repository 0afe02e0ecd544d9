# SPDX-License-Identifier: Apache-2.0
"""A bidirectional model over prompts and answers, and whether a model is one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ...model.checks import num_positions
from .sampler import Reader

_TOLERANCE = 0.02  # of the largest logit: more than bfloat16 rounds, less than a token that is read changes


def completion_logits(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: torch.Tensor, *, pad_token_id: int
) -> torch.Tensor:
    """Logits (n, C, V) at the answers' positions; rows with shorter prompts are padded behind their answer.

    Args:
        model: a bidirectional model, wrapped or not.
        prompts: token ids of each row.
        answers: (n, C) int64.
        pad_token_id: any token; it is masked out.
    """
    count, device = answers.size(1), answers.device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(answers), int(starts.max()) + count), pad_token_id, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    places = starts[:, None] + torch.arange(count, device=device)  # (n, C)
    ids.scatter_(1, places, answers)
    mask = torch.arange(ids.size(1), device=device) < starts[:, None] + count
    padding = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    logits = model(input_ids=ids, **padding).logits
    return logits.gather(1, places[..., None].expand(-1, -1, logits.size(-1)))


def reader_of(model: nn.Module, pad_token_id: int) -> Reader:
    """`completion_logits` of one model."""
    return partial(completion_logits, model, pad_token_id=pad_token_id)


def token_ids(settings: Any, tokenizer: Any) -> tuple[int, int]:
    """The mask token and the end token: what the settings say, else the tokenizer's.

    Raises:
        ValueError: there is none, or they are one.
    """
    found = []
    for name, text in (("mask_token_id", "masked positions"), ("eos_token_id", "the end of an answer")):
        value = getattr(settings, name)
        value = getattr(tokenizer, name, None) if value is None else value
        if value is None:
            raise ValueError(f"{name}=None, and the tokenizer has no token for {text}. Set it to that of the model.")
        found.append(int(value))
    if found[0] == found[1]:
        raise ValueError(f"mask_token_id={found[0]} is the end token too. Set it to the token of masked positions.")
    return found[0], found[1]


@torch.no_grad()
def check_model(model: nn.Module, settings: Any, mask_token_id: int, *, pads: bool) -> None:
    """Check that a model fills in masks: that a position reads what stands behind it, and no padding.

    Args:
        model: not wrapped by an engine.
        settings: lengths.
        mask_token_id: of masked positions.
        pads: whether rows of a batch may need padding.

    Raises:
        ValueError: it has no row for the mask token, too few positions, reads nothing behind a position, or reads padding.
    """
    limit = num_positions(model.config)
    longest = settings.max_prompt_length + settings.max_completion_length
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_prompt_length={settings.max_prompt_length} and max_completion_length={settings.max_completion_length}: "
            f"the model has positions for {limit} tokens. Set them to that many together."
        )
    num_tokens = model.get_input_embeddings().weight.shape[0]
    if not 0 <= mask_token_id < num_tokens:
        raise ValueError(f"mask_token_id={mask_token_id} is not one of the model's {num_tokens} tokens.")
    modes = [module for module in model.modules() if module.training]
    model.eval()
    try:
        _probe(model, mask_token_id, num_tokens, pads)
    finally:
        for module in modes:
            module.training = True


def _probe(model: nn.Module, mask_token_id: int, num_tokens: int, pads: bool) -> None:
    one, other = [token for token in range(min(num_tokens, 4)) if token != mask_token_id][:2]
    device = next(model.parameters()).device
    ids = torch.tensor([[one, mask_token_id, one], [one, mask_token_id, other]], device=device)
    plain, changed = model(input_ids=ids).logits[:, 1].float()
    if torch.equal(plain, changed):
        raise ValueError(
            f"model: {model.config.model_type} is causal: what it says at a position is the same whatever stands behind it, so "
            "it cannot fill in masks from both sides. Use a masked-diffusion language model, or OPSDTrainer for this one."
        )
    if not pads:
        return
    padded = torch.cat([ids[:1], ids.new_full((1, 2), other)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]], device=device)
    seen = model(input_ids=padded, attention_mask=mask).logits[0, 1].float()
    if (seen - plain).abs().max() > _TOLERANCE * plain.abs().max():
        raise ValueError(
            f"model: {model.config.model_type} reads padding that attention_mask leaves out, so prompts of unequal length "
            "cannot stand in one batch. Set per_device_train_batch_size to 1."
        )
