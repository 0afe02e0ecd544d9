# SPDX-License-Identifier: Apache-2.0
"""The moving average of what a LoRA pair adds to a weight, as a pair of the same rank."""

import torch
from torch import nn


def average_low_rank(
    teacher: tuple[torch.Tensor, torch.Tensor], student: tuple[torch.Tensor, torch.Tensor], rate: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(1 - rate) B_T A_T + rate B_S A_S as the best pair of the same rank.

    Args:
        teacher: A (..., r, in) and B (..., out, r); pairs of leading dimensions are apart.
        student: the same shapes.
        rate: weight of the student, in (0, 1].

    Returns:
        A (..., r, in), B (..., out, r), and the Frobenius norm of what rank r cannot hold over that of the whole.
    """
    rank = teacher[0].shape[-2]
    left, left_core = torch.linalg.qr(torch.cat([(1 - rate) * teacher[1], rate * student[1]], dim=-1))
    right, right_core = torch.linalg.qr(torch.cat([teacher[0], student[0]], dim=-2).mT)
    u, s, v = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    total = s.square().sum().sqrt().item()
    lost = s[..., rank:].square().sum().sqrt().item() / total if total else 0.0
    a, b = root.unsqueeze(-1) * (v[..., :rank, :] @ right.mT), (left @ u[..., :rank]) * root.unsqueeze(-2)
    return nn.functional.pad(a, (0, 0, 0, rank - a.shape[-2])), nn.functional.pad(b, (0, rank - b.shape[-1])), lost


def by_expert(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views A (E, r, in) and B (E, out, r) of PEFT's factors, where one parameter holds the weights of E experts.

    Args:
        a: (E r, in), expert after expert.
        b: (out, r E), in which the expert's number runs fastest.
        experts: E; with 1 the factors come back as they are.
    """
    if experts == 1:
        return a, b
    return a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
