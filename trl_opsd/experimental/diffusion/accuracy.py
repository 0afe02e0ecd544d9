# SPDX-License-Identifier: Apache-2.0
"""How often a masked-diffusion model is right, by the sampler that trains it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...evaluation.sampling import check_sampling, evaluation_mode, render_prompt
from ...verification import start_verifying
from .reading import reader_of, token_ids
from .sampler import denoise, text_length
from .settings import DiffusionOPSDSettings


def measure_accuracy(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    settings: DiffusionOPSDSettings,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
) -> list[float]:
    """Share of right answers to each question, in the order of the rows.

    Args:
        model: a masked-diffusion model; the mode of each of its modules is restored.
        tokenizer: its tokenizer.
        rows: questions with a `prompt` and a `solution` that verifies.
        settings: of the sampler: lengths, steps, tokens, verifier.
        num_samples: answers of a question, 1 or more; several need a temperature above 0.
        temperature: of the draw, 0 for the likeliest tokens, as the authors evaluate.
        batch_size: answers that are sampled at once.
        seed: the draws are a function of it.

    Raises:
        ValueError: a setting is outside its range.
    """
    check_sampling(num_samples, temperature)
    settings.check()
    mask_token_id, eos_token_id = token_ids(settings, tokenizer)
    device = next(model.parameters()).device
    pad_token_id = eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    asked = [index for index in range(len(rows)) for _ in range(num_samples)]
    prompts = [render_prompt(tokenizer, row["prompt"], settings.chat_template_kwargs) for row in rows]
    texts = []
    with evaluation_mode(model):
        for start in range(0, len(asked), batch_size):
            places = range(start, min(start + batch_size, len(asked)))
            answers = denoise(
                reader_of(model, pad_token_id),
                [prompts[asked[place]] for place in places],
                settings,
                mask_token_id=mask_token_id,
                eos_token_id=eos_token_id,
                temperature=temperature,
                generators=[torch.Generator(device).manual_seed(seed * len(asked) + place) for place in places],
            )
            ended = [answer.completion[: text_length(answer.completion, eos_token_id)] for answer in answers]
            texts += [tokenizer.decode(ids, skip_special_tokens=True) for ids in ended]
    pairs = [(text, rows[index]["solution"]) for text, index in zip(texts, asked, strict=True)]
    right = torch.tensor([float(bool(verdict.is_right)) for verdict in start_verifying(pairs, settings.verifier)()])
    return right.view(len(rows), num_samples).mean(1).tolist()
