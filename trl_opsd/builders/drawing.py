# SPDX-License-Identifier: Apache-2.0
"""Completions of a batch whose next token is drawn, row by row, from one of several readers.

Every row has random numbers of its own, two a token: one that chooses, one that draws. So a row's completion does not
depend on the rows beside it, and readers that agree give the same completion whichever of them is chosen.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .readers import Reader

TOP_K = 64  # MixSD's, where it samples


class Draws(NamedTuple):
    """One row's completion.

    Attributes:
        ids: tokens, the one that ended it included.
        readers: of each token, the index of the reader that it was drawn from.
    """

    ids: list[int]
    readers: list[int]


class Choice:
    """The rule of one row that says which reader its next token comes from."""

    def first(self, chance: float) -> int:
        """The reader to draw from, given a uniform number in [0, 1)."""
        raise NotImplementedError

    def settle(self, reader: int, token: int, others: Callable[[int], int]) -> tuple[int, int]:
        """The reader and the token that stay, once a token was drawn.

        Args:
            reader: that `first` chose.
            token: that was drawn from it.
            others: the token that another reader would give, by its index.
        """
        return reader, token


def row_random(seed: int, row: int, attempt: int) -> random.Random:
    """The random numbers of one try of a row."""
    return random.Random(f"{seed}/{row}/{attempt}")


def candidates(logits: torch.Tensor, temperature: float, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, likeliest first, and the cumulated mass up to each.

    Args:
        logits: (B, V).
        temperature: 0 leaves the likeliest alone.
        top_k: so many likeliest tokens share the mass; 0 for all.

    Returns:
        Ids and mass, both (B, K), the mass in float64, on the CPU.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return best.cpu(), torch.ones(best.shape, dtype=torch.float64)
    size = min(top_k or logits.shape[-1], logits.shape[-1])
    best, ids = logits.topk(size)
    return ids.cpu(), (best.cpu().double() / temperature).softmax(-1).cumsum(-1)


def draw_token(ids: torch.Tensor, mass: torch.Tensor, chance: float) -> int:
    """The token at which the cumulated mass passes `chance`, uniform in [0, 1); both of `candidates`, of one row."""
    place = int(torch.searchsorted(mass, torch.tensor(chance, dtype=mass.dtype), right=True))
    return int(ids[min(place, len(ids) - 1)])  # the last mass may round to just below 1


def draw_completions(
    readers: Sequence[Reader],
    choices: Sequence[Choice],
    randoms: Sequence[random.Random],
    stops: set[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = TOP_K,
) -> list[Draws]:
    """A completion of every row of the readers' batch.

    Args:
        readers: one or more, whose batches have the same rows.
        choices: the rule of each row.
        randoms: the random numbers of each row.
        stops: tokens that end a completion.
        max_new_tokens: length limit, 1 or more.
        temperature, top_k: see `candidates`.

    Returns:
        What was drawn, one for each row.
    """
    draws = [Draws([], []) for _ in choices]
    alive = list(range(len(choices)))
    for step in range(max_new_tokens):
        likely = [candidates(reader.logits, temperature, top_k) for reader in readers]
        for place, row in enumerate(alive):
            reader, token = _next(choices[row], randoms[row], [(ids[place], mass[place]) for ids, mass in likely])
            draws[row].ids.append(token)
            draws[row].readers.append(reader)
        going = [place for place, row in enumerate(alive) if draws[row].ids[-1] not in stops]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            alive = [alive[place] for place in going]
            for reader in readers:
                reader.keep(going)
        told = torch.tensor([draws[row].ids[-1] for row in alive])
        for reader in readers:
            reader.read(told)
    return draws


def _next(
    choice: Choice, randoms: random.Random, likely: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[int, int]:
    """The reader that is drawn from, and its token; both random numbers are taken whatever the rule."""
    choose, draw = randoms.random(), randoms.random()
    reader = choice.first(choose)
    return choice.settle(reader, draw_token(*likely[reader], draw), lambda other: draw_token(*likely[other], draw))
