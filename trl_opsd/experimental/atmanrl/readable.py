# SPDX-License-Identifier: Apache-2.0
"""Which models can be read under an additive mask of ours; each refusal names what is in the way and what to take instead."""

import inspect
from typing import Any

from torch import nn

from ...model.checks import check_model_config
from ...model.heads import causal_lm
from ...model.sharding import is_sharded

_ATTENTIONS = ("eager", "sdpa")


def check_readable(model: Any) -> None:
    """Check that a model's attention takes an additive mask with a gradient.

    Raises:
        ValueError: it is no model or one of images, its attention is not `eager` or `sdpa`, some layers have no full attention, it
            takes no positions, an adapter learns a prompt, or its parameters are sharded.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is not a model; load it and give the object.")
    check_model_config(model.config)
    config = model.config.get_text_config()
    _check_attention(config)
    _check_layers(config)
    _check_tokens(model)
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model: its parameters are sharded (ZeRO-3 or FSDP2), and a reward function cannot gather them for some ranks alone. "
            "Give a frozen copy, loaded before the training arguments are made, or train under DDP or ZeRO-2."
        )


def _check_attention(config: Any) -> None:
    used = config._attn_implementation
    if used not in _ATTENTIONS:
        raise ValueError(
            f"attn_implementation={used!r} reads no additive mask with a gradient. Load the model, or a frozen copy for the reward, "
            'with attn_implementation="sdpa" or "eager".'
        )


def _check_layers(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if set(kinds or ()) - {"full_attention"} or (window and not kinds):
        raise ValueError(
            f"model: {config.model_type} has layers of the kinds {sorted(set(kinds or ['sliding_attention']))} (sliding_window={window!r}), "
            "where a mask of ours would open windows. Use a model with full attention in every layer."
        )


def _check_tokens(model: nn.Module) -> None:
    if "position_ids" not in inspect.signature(type(causal_lm(model)).forward).parameters:
        raise ValueError(
            f"model: {model.config.model_type} takes no position_ids, so rollouts of unequal length cannot be read together. Use a "
            "model that does, such as a Qwen3 or a Llama."
        )
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "model: it learns a prompt (PEFT), whose tokens no mask of ours counts. Use LoRA or no adapter."
        )
