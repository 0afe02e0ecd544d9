# SPDX-License-Identifier: Apache-2.0
"""Block-wise sampling of a masked-diffusion language model that keeps its states (LLaDA, arXiv 2502.09992).

An answer begins as masks. Blocks are filled in from left to right. In a step every masked position of the block draws a token, and
those whose token is likeliest keep it (low-confidence remasking). What a step reads is a state.

Differences to the authors' sampler:
1. The mask token is never drawn. Theirs may draw it, after which a block can end with masks in it.
2. Noise is float32 in the logarithm, whatever the model's precision is, and each prompt has random numbers of its own.
3. The end token is looked for in the answer alone; theirs looks at the prompt too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .settings import DiffusionOPSDSettings

# From prompts and answers (n, C) to logits (n, C, V) at the answers' positions.
Reader = Callable[[Sequence[Sequence[int]], torch.Tensor], torch.Tensor]


class Denoised(NamedTuple):
    """A finished answer and what led to it.

    Attributes:
        completion: (C,) int64, without masks.
        states: (n, C) int64, what each step that may be trained read, in their order. There is none of the last block, nor any
            from when the text is complete up to its end token; n may be 0.
    """

    completion: torch.Tensor
    states: torch.Tensor


def text_length(completion: torch.Tensor, eos_token_id: int) -> int:
    """Tokens of an answer (C,) before its first end token; C where it has none."""
    ends = (completion == eos_token_id).nonzero()
    return int(ends[0]) if len(ends) else len(completion)


def is_complete(state: torch.Tensor, *, mask_token_id: int, eos_token_id: int) -> bool:
    """Whether a state (C,) has an end token and no mask in front of the first one."""
    length = text_length(state, eos_token_id)
    return length < len(state) and not bool((state[:length] == mask_token_id).any())


@torch.no_grad()
def denoise(
    read: Reader,
    prompts: Sequence[Sequence[int]],
    settings: DiffusionOPSDSettings,
    *,
    mask_token_id: int,
    eos_token_id: int,
    temperature: float,
    generators: Sequence[torch.Generator],
) -> list[Denoised]:
    """Sample one answer of each prompt.

    Args:
        read: the model.
        prompts: token ids of each.
        settings: lengths and steps.
        mask_token_id: of a masked position; it is never drawn.
        eos_token_id: that ends an answer.
        temperature: of the drawn tokens, 0 for the likeliest; how sure a token is is read at temperature 1 in any case.
        generators: random numbers of each prompt, on the device that `read` answers from. An answer is a function of its own.
    """
    device, length = generators[0].device, settings.block_length
    answers = torch.full((len(prompts), settings.max_completion_length), mask_token_id, device=device)
    states: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, answers.size(1), length):
        block = answers[:, start : start + length]  # a view, which a step writes to
        is_last = start + length == answers.size(1)
        for _ in range(settings.steps_per_block):
            for row, answer in enumerate(answers):
                ids = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id}
                if not is_last and not is_complete(answer, **ids):
                    states[row].append(answer.clone())
            logits = read(prompts, answers)[:, start : start + length].float()
            logits[..., mask_token_id] = -torch.inf
            fill_in(block, logits, block == mask_token_id, settings.tokens_per_step, temperature, generators)
    empty = answers.new_empty(0, answers.size(1))
    return [
        Denoised(answer, torch.stack(kept) if kept else empty) for answer, kept in zip(answers, states, strict=True)
    ]


def fill_in(
    block: torch.Tensor,
    logits: torch.Tensor,
    masked: torch.Tensor,
    count: int,
    temperature: float,
    generators: Sequence[torch.Generator],
) -> None:
    """Write `count` drawn tokens of each row into a block (n, L), at the masked positions whose token is likeliest.

    Args:
        block: (n, L) int64, changed in place.
        logits: (n, L, V) float32.
        masked: (n, L) bool, at least `count` a row.
        count: tokens of a step.
        temperature: of the draw, 0 for the likeliest tokens.
        generators: one a row.
    """
    scores = logits
    if temperature > 0:  # the largest of log-probabilities with Gumbel noise is a draw
        waits = [torch.empty_like(row).exponential_(generator=own) for row, own in zip(logits, generators, strict=True)]
        scores = logits / temperature - torch.stack(waits).log()
    tokens = scores.argmax(-1)
    sureness = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).masked_fill(~masked, -torch.inf)
    places = sureness.topk(count, dim=-1).indices
    block.scatter_(1, places, tokens.gather(1, places))
