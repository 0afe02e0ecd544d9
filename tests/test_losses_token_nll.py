# SPDX-License-Identifier: Apache-2.0
"""The fused likelihood loss is torch's cross entropy of the dense logits, in value and gradients."""

import pytest
import torch

from trl_opsd.losses import fused_token_nll

N, H, V = 7, 5, 11
WEIGHTS = [0.3, 0.1, 0.0, 0.7, 0.2, 0.0, 0.4]
VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 1.3},
    "bias": {"head_bias": True},
    "scale": {"logit_scale": 0.5},
    "softcap": {"logit_softcap": 2.0, "logit_scale": 0.5, "temperature": 1.3, "head_bias": True},
}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(variant, dtype=torch.float64):
    settings = dict(VARIANTS[variant])
    leaves = [draw(N, H).to(dtype).requires_grad_(), draw(V, H, seed=1).to(dtype).requires_grad_()]
    if settings.pop("head_bias", False):
        settings["head_bias"] = draw(V, seed=2).to(dtype).requires_grad_()
        leaves.append(settings["head_bias"])
    return leaves, torch.tensor([0, 10, 3, 3, 7, 1, 5]), torch.tensor(WEIGHTS, dtype=dtype), settings


def cross_entropy(hidden, weight, ids, *, temperature=1.0, head_bias=0.0, logit_scale=1.0, logit_softcap=None):
    logits = logit_scale * (hidden @ weight.T + head_bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return torch.nn.functional.cross_entropy(logits / temperature, ids, reduction="none")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tile_tokens", [1, 3, None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients_are_those_of_cross_entropy(variant, tile_tokens, dtype, tolerance):
    leaves, ids, weights, settings = make(variant, dtype)
    want = cross_entropy(*leaves[:2], ids, **settings)
    loss, values = fused_token_nll(*leaves[:2], ids, token_weights=weights, tile_tokens=tile_tokens, **settings)
    assert not values.requires_grad
    torch.testing.assert_close(values, want.detach() * (weights != 0), rtol=0, atol=tolerance)
    torch.testing.assert_close(loss, (want * weights).sum(), rtol=0, atol=tolerance)
    got = torch.autograd.grad(1.7 * loss, leaves)
    for ours, theirs in zip(got, torch.autograd.grad(1.7 * (want * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_no_weighted_position_gives_a_connected_zero():
    leaves, ids, weights, _ = make("plain")
    loss, values = fused_token_nll(*leaves, ids, token_weights=torch.zeros_like(weights))
    assert loss.item() == 0 and not values.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(N + 1, dtype=torch.long)}, r"token_ids is for \(8,\) positions"),
        ({"weights": torch.ones(N - 1)}, r"token_ids is for \(7,\) positions and token_weights for \(6,\)"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0"),
        ({"tile_tokens": 0}, "tile_tokens=0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    leaves, ids, weights, _ = make("plain")
    ids, weights = change.pop("ids", ids), change.pop("weights", weights)
    with pytest.raises(ValueError, match=message):
        fused_token_nll(*leaves, ids, token_weights=weights, **change)
