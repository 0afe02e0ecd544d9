# SPDX-License-Identifier: Apache-2.0
"""What the teacher sees of an answer, and which of its states an update is trained on (d-OPSD, arXiv 2606.18195)."""

import torch

from .sampler import Denoised, text_length
from .settings import DiffusionOPSDSettings


def teacher_states(
    answer: Denoised, settings: DiffusionOPSDSettings, *, eos_token_id: int, generator: torch.Generator
) -> torch.Tensor:
    """The states with a random share of each one's later blocks filled in from the finished answer, (n, C) int64.

    Where the block behind the current one begins at the end token or behind it, nothing is filled in. Elsewhere positions are drawn
    of all later ones, those behind the end too.

    Args:
        answer: with its states.
        settings: `retained_share`, and the blocks.
        eos_token_id: that ends the answer.
        generator: on the CPU.
    """
    filled, length = answer.states.clone(), text_length(answer.completion, eos_token_id)
    for step, state in enumerate(filled):
        start = (step // settings.steps_per_block + 1) * settings.block_length
        num_later = len(state) - start
        if start >= length:
            continue
        drawn = torch.randperm(num_later, generator=generator)[: int(num_later * settings.retained_share)]
        places = (start + drawn).to(state.device)
        state[places] = answer.completion[places]
    return filled


def states_of_update(num_states: int, update: int, num_updates: int) -> slice:
    """Which states of an answer an update trains on: equally many each, in order, and what remains on none.

    As in the authors' code the last state is never trained, because it stands for what the last step led to.

    Args:
        num_states: of the answer.
        update: of 0 to num_updates - 1.
        num_updates: updates of a sample.

    Returns:
        Empty where there are not more states than updates.
    """
    size = max(0, num_states - 1) // num_updates
    return slice(update * size, (update + 1) * size)
