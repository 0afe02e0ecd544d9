# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities under truncated sampling, beside a derivation entry by entry and transformers' warpers."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_opsd.losses.truncation import truncated_log_probs

CUTS = [
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 6, "min_p": 0.1},
    {"top_k": 100, "top_p": 1.0},
]


def by_hand(logits, token, temperature=1.0, top_k=None, top_p=1.0, min_p=None):
    """One position, with `math`: the tokens by likelihood, cut one rule after the other, the token itself always in."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    if min_p:
        order = [index for index in order if weights[index] >= min_p * weights[order[0]]]
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(weights[index] for index in order), 0.0, []
    for index in order:
        if mass < top_p * total or top_p >= 1:
            kept.append(index)
        mass += weights[index]
    return math.log(weights[token] / sum(weights[index] for index in {*kept, token}))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_it_is_the_derivation_by_hand_for_every_token(cuts):
    logits = 2 * torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for token in range(12):
        tokens = torch.full((6,), token)
        wanted = [by_hand(row.tolist(), token, **cuts) for row in logits]
        assert truncated_log_probs(logits, tokens, **cuts).tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_tokens_that_sampling_may_draw_have_the_numbers_of_transformers(cuts):
    logits = 2 * torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(cuts.get("temperature", 1.0))])
    warpers += [TopKLogitsWarper(cuts["top_k"])] if "top_k" in cuts else []
    warpers += [TopPLogitsWarper(cuts["top_p"])] if cuts.get("top_p", 1.0) < 1 else []
    warpers += [MinPLogitsWarper(cuts["min_p"])] if "min_p" in cuts else []
    theirs = warpers(torch.zeros(50, 1, dtype=torch.long), logits).log_softmax(-1)
    tokens = torch.multinomial(theirs.exp(), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    wanted = theirs.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(truncated_log_probs(logits, tokens, **cuts), wanted, rtol=1e-12, atol=1e-12)
