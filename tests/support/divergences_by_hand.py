# SPDX-License-Identifier: Apache-2.0
"""Divergences by loops over the vocabulary, in numbers of Python."""

import itertools
import math

import torch

from trl_opsd.losses import CLIPS, DIVERGENCES

RULES = list(itertools.product(DIVERGENCES, CLIPS))
# A reward that is held constant gives the derivative of reverse KL only while no entry is cut.
DIFFERENTIATED = [rule for rule in RULES if rule[0] != "policy_reverse_kl" or rule[1] in (None, "token")]
MIXTURE_WEIGHT, TEMPERATURE, CLIP_VALUE = 0.3, 1.3, 0.04


def draw(*shape, seed=0, scale=1.5):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def settings(name, clip):
    return {
        "divergence": name,
        "mixture_weight": MIXTURE_WEIGHT,
        "temperature": TEMPERATURE,
        "clip": clip,
        "clip_value": CLIP_VALUE,
    }


def softmax_by_hand(logits):
    powers = [math.exp(z / TEMPERATURE) for z in logits]
    return [power / sum(powers) for power in powers]


def term_and_slope(name, q, p):
    """One entry's term and its derivative with respect to log q."""
    m = MIXTURE_WEIGHT * p + (1 - MIXTURE_WEIGHT) * q
    if name == "forward_kl":
        return p * (math.log(p) - math.log(q)), -p
    if name == "reverse_kl":
        return q * (math.log(q) - math.log(p)), q * (math.log(q) - math.log(p) + 1)
    if name == "policy_reverse_kl":  # where q is a distribution; the reward is held constant
        return q * (math.log(q) - math.log(p)), q * (math.log(q) - math.log(p))
    kl_target, kl_student = p * math.log(p / m), q * math.log(q / m)
    if name == "skewed_forward_kl":
        return kl_target, -(1 - MIXTURE_WEIGHT) * p * q / m
    if name == "skewed_reverse_kl":
        return kl_student, kl_student + q - (1 - MIXTURE_WEIGHT) * q * q / m
    if name == "jsd":
        return MIXTURE_WEIGHT * kl_target + (1 - MIXTURE_WEIGHT) * kl_student, (1 - MIXTURE_WEIGHT) * kl_student
    raise ValueError(f"{name} has no second derivation; write one here.")
