# SPDX-License-Identifier: Apache-2.0
"""The projection of sensitive directions against an SVD of the gradients, and a folded layer against a hook."""

import pytest
import torch

from trl_opsd.losses.subspace import fold_projection, sensitive_projection

SIZE = 6


@pytest.fixture
def gradients():
    return torch.randn(40, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_projection_is_onto_the_leading_right_singular_vectors(gradients, rank):
    projection = sensitive_projection(gradients.T @ gradients, rank)
    leading = torch.linalg.svd(gradients).Vh[:rank]
    by_hand = sum(torch.outer(vector, vector) for vector in leading)
    torch.testing.assert_close(projection, by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-12)
    torch.testing.assert_close(projection, projection.T, rtol=0, atol=0)
    assert projection.trace().item() == pytest.approx(rank, abs=1e-12)


def test_the_full_rank_changes_nothing_at_all(gradients):
    projection = sensitive_projection(gradients.T @ gradients, SIZE)
    layer = torch.nn.Linear(4, SIZE)
    before = layer.weight.clone(), layer.bias.clone()
    fold_projection(layer, projection)
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.bias, before[1])


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_gives_what_a_hook_on_its_output_gives(gradients, bias):
    projection = sensitive_projection(gradients.T @ gradients, 3)
    layer = torch.nn.Linear(4, SIZE, bias=bias, dtype=torch.float64)
    inputs = torch.randn(7, 4, dtype=torch.float64)
    hook = layer.register_forward_hook(lambda module, given, output: output @ projection)
    hooked = layer(inputs)
    hook.remove()
    assert (layer(inputs) - hooked).abs().max() > 0.01
    fold_projection(layer, projection)
    torch.testing.assert_close(layer(inputs), hooked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_no_subspace_has_is_refused(gradients, rank):
    with pytest.raises(ValueError, match=f"rank is {rank}; set it to 1 to 6"):
        sensitive_projection(gradients.T @ gradients, rank)
