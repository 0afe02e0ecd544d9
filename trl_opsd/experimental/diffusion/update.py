# SPDX-License-Identifier: Apache-2.0
"""The loss of one update: the states of each prompt's answer that it trains on (d-OPSD, arXiv 2606.18195)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...losses import Divergence, current_block, denoising_divergence, surest_positions
from .contexts import states_of_update
from .drawing import Sample
from .sampler import Reader
from .settings import DiffusionOPSDSettings


@dataclass
class Update:
    """States of a micro-batch's prompts in one sequence.

    Attributes:
        prompts: of each state.
        states: (n, C) int64 that the student reads.
        taught: (n, C) int64 that the teacher reads.
        weights: of each state. A prompt that is trained on has 1 / B in all, shared by its states.
        counts: states of each of the B prompts that count.
    """

    prompts: list[list[int]]
    states: torch.Tensor
    taught: torch.Tensor
    weights: list[float]
    counts: list[int]

    @classmethod
    def of(cls, samples: Sequence[Sample], update: int, settings: DiffusionOPSDSettings) -> "Update":
        """The states of an update, and one of weight 0 where no prompt has any, so that every process has a gradient."""
        chosen = [
            states_of_update(0 if sample.reason else len(sample.states), update, settings.updates_per_sample)
            for sample in samples
        ]
        counts = [part.stop - part.start for part in chosen]
        prompts = [sample.prompt for sample, count in zip(samples, counts, strict=True) for _ in range(count)]
        pairs = list(zip(samples, chosen, strict=True))
        states = torch.cat([sample.states[part] for sample, part in pairs])
        taught = torch.cat([sample.taught[part] for sample, part in pairs])
        weights = [1 / (count * len(samples)) for count in counts for _ in range(count)]
        if not prompts:
            prompts, weights = [samples[0].prompt], [0.0]
            states = taught = samples[0].states[:1]
        return cls(prompts, states, taught, weights, counts)


def update_loss(
    read: Reader,
    update: Update,
    teacher_logits: torch.Tensor,
    rule: Divergence,
    settings: DiffusionOPSDSettings,
    mask_token_id: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over prompts of the mean over their states of the divergence at the positions of which the teacher is surest.

    Args:
        read: the student.
        update: what it reads.
        teacher_logits: (n, C, V) of what the teacher reads.
        rule: the divergence of a position.
        settings: the blocks, and the tokens of a step, which are as many positions of a state.
        mask_token_id: of a masked position.

    Returns:
        The loss, 0-d, and for the log: values of states that count, and how many each prompt has.
    """
    masked = current_block(update.states == mask_token_id, settings.block_length)
    places = surest_positions(teacher_logits, masked, settings.tokens_per_step)
    student = _at(read(update.prompts, update.states), places)
    teacher = _at(teacher_logits, places)
    sums, facts = denoising_divergence(student, teacher, rule)
    facts["top_token_agreement"] = (student.argmax(-1) == teacher.argmax(-1)).float().mean(-1)
    weights = sums.new_tensor(update.weights)
    facts = {name: values[weights > 0] for name, values in facts.items()}
    facts["states/trained"] = sums.new_tensor(update.counts)
    return (sums * weights).sum(), facts


def _at(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Logits (n, K, V) of places (n, K)."""
    return logits.gather(1, places[..., None].expand(-1, -1, logits.size(-1)))
