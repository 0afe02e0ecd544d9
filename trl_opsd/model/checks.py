# SPDX-License-Identifier: Apache-2.0
"""What is checked of the model before any training, each with an error that names the fix."""

import warnings
from typing import Any


def check_model_config(config: Any) -> None:
    """Check that a model is a decoder-only language model.

    Raises:
        ValueError: it is an encoder-decoder, or reads images or audio.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: {config.model_type} is an encoder-decoder; the teacher scores the student's tokens as a "
            "continuation. Use a decoder-only model."
        )
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ValueError(
            f"model: {config.model_type} reads images or audio, which are not carried into the teacher's prompt. Use "
            "its text-only checkpoint."
        )


def num_positions(config: Any) -> int | None:
    """Tokens that the model has positions for; None where its config names no limit."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("factor"):  # YaRN and its like reach further than the config's own number says
        positions = max(positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions)))
    return positions


def check_engine(state: Any, *, adapters: bool = False, quantized: bool = False) -> None:
    """Check that a distributed engine is one whose shards the teacher can take part in.

    Args:
        state: accelerate's state of the run.
        adapters: whether PEFT adapters train.
        quantized: whether the weights below them have 4 or 8 bits.

    Raises:
        ValueError: the engine is FSDP1, splits more than the batch and the parameters, saves adapters that cannot be read
            again, or shards weights of 4 or 8 bits.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    shards = plugin is not None or getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 0) == 3
    if quantized and shards:
        raise ValueError(
            "model: its base has 4 or 8 bits (bitsandbytes), and ZeRO-3 or FSDP2 would shard it, which was never tried here. "
            "Set ddp or zero2 (recipes/accelerate/); a base of 4 bits is small."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: FSDP1 flattens parameters together, so the teacher's values cannot be "
            "laid out as the student's. Set fsdp_version: 2 in the accelerate config (recipes/accelerate/fsdp2.yaml)."
        )
    if plugin is not None and adapters and plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing: true renames the layers, and PEFT saves adapters under names that it cannot "
            "read. Set it to false and gradient_checkpointing to true in the training arguments."
        )
    if plugin is not None and "SHARDED" in str(plugin.state_dict_type):
        warnings.warn(
            "fsdp_state_dict_type=SHARDED_STATE_DICT: save_model writes no weights, only checkpoints hold them. Set "
            "fsdp_state_dict_type: FULL_STATE_DICT to get a model that from_pretrained reads.",
            stacklevel=4,
        )
    parallelism = getattr(state, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallelism, name, 1) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config {name}={size}: the loss needs whole sequences and a whole output head in every "
                f"forward. Set {name} to 1 and shard with ZeRO-3 or FSDP2."
            )


def check_vocabulary(config: Any, head_rows: int, num_tokens: int) -> None:
    """Check that config, output head and tokenizer agree on the vocabulary.

    Raises:
        ValueError: the head's rows differ from the config's, or the tokenizer has more tokens than rows.
    """
    vocab_size = config.get_text_config().vocab_size
    if head_rows != vocab_size:
        raise ValueError(
            f"model: its output head has {head_rows} rows but config.vocab_size is {vocab_size}. Call "
            f"`model.resize_token_embeddings({vocab_size})` or correct the config."
        )
    if num_tokens > head_rows:
        raise ValueError(
            f"processing_class: the tokenizer has {num_tokens} tokens but the model only {head_rows} rows. Use the "
            f"model's own tokenizer, or call `model.resize_token_embeddings({num_tokens})`."
        )
