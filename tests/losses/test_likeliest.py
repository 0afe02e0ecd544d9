# SPDX-License-Identifier: Apache-2.0
"""The likeliest tokens of a position, tile by tile, and the share of another sequence's tokens among them."""

import pytest
import torch

from trl_opsd.losses import OutputHead, likeliest_tokens, token_overlap


def by_sorting(hidden, head, k, num_tokens):
    logits = head.logits(hidden)[:, :num_tokens].tolist()
    return [set(sorted(range(len(row)), key=row.__getitem__)[-k:]) for row in logits]


@pytest.mark.parametrize("tile_tokens", [1, 3, 100])
@pytest.mark.parametrize(("k", "num_tokens"), [(1, None), (4, None), (4, 7), (99, None)])
def test_they_are_the_last_of_the_sorted_logits_whatever_the_tile(k, num_tokens, tile_tokens):
    torch.manual_seed(0)
    hidden = torch.randn(8, 5, dtype=torch.float64)
    head = OutputHead(torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64), logit_scale=0.5)
    found = likeliest_tokens(hidden, head, k, num_tokens=num_tokens, tile_tokens=tile_tokens)
    assert found.shape == (8, min(k, num_tokens or 11))
    assert [set(row) for row in found.tolist()] == by_sorting(hidden, head, k, num_tokens)


def test_no_position_has_none():
    assert likeliest_tokens(torch.zeros(0, 5), OutputHead(torch.zeros(11, 5)), 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 4], 1.0),
        ([2, 9], 0.5),
        ([9, 1], 0.0),  # 1 is likely at another place
        ([1, 4, 1, 4], 0.5),  # what stands behind the end matches nothing, and counts
        ([2], 1.0),
        ([], 0.0),
    ],
)
def test_the_share_is_of_the_sequences_tokens_at_the_same_place(tokens, share):
    likeliest = torch.tensor([[1, 2], [3, 4]])
    assert token_overlap(torch.tensor(tokens, dtype=torch.long), likeliest) == share
