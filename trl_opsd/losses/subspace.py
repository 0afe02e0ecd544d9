# SPDX-License-Identifier: Apache-2.0
"""The subspace of activations to which a loss is most sensitive, and a linear layer whose output is projected onto it."""

import torch


def sensitive_projection(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The orthogonal projection onto the leading right-singular vectors of a matrix of gradients, P = V V'.

    Args:
        gram: G' G of the gradients, (D, D), where a row of G is the gradient at one position.
        rank: number of vectors, 1 to D; D gives the identity exactly.

    Returns:
        P, (D, D), symmetric with P P = P, in float64.

    Raises:
        ValueError: `rank` is outside its range.

    Paper: SPD (arXiv 2605.22675), the projection of keys and values.
    """
    size = gram.shape[-1]
    if not 1 <= rank <= size:
        raise ValueError(f"rank is {rank}; set it to 1 to {size}, the size of the activations.")
    if rank == size:
        return torch.eye(size, dtype=torch.float64, device=gram.device)
    vectors = torch.linalg.eigh(gram.double()).eigenvectors[:, -rank:]  # eigenvalues ascend
    return vectors @ vectors.T


@torch.no_grad()
def fold_projection(layer: torch.nn.Linear, projection: torch.Tensor) -> None:
    """Change a linear layer, in place, so that it gives its projected output: W becomes P W, and b becomes P b.

    Args:
        layer: with `weight` (D, E) and a `bias` (D,) or None.
        projection: P, (D, D), symmetric.

    Paper: SPD (arXiv 2605.22675); that it is the output of the layer which is projected is inferred.
    """
    for values in (layer.weight, layer.bias):
        if values is not None:
            values.copy_(projection.to(values.device) @ values.double())
