# SPDX-License-Identifier: Apache-2.0
"""Completions of prompts by a vLLM engine, as `generation.generate_completions` makes them by transformers.

The engine gets token ids rendered here and the same stop tokens, so that both backends read the same prompts and count
the same lengths. Their draws differ, so base and model must be sampled by the same one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from .sampling import Completion, Prompt, check_sampling, read_completion, render_prompt, stop_tokens


class Engine(NamedTuple):
    """A vLLM engine and the tokens that end a completion of its model."""

    llm: Any
    stops: set[int]


def load_engine(name: str, dtype: str, options: Mapping[str, Any] | None = None) -> tuple[Engine, Any]:
    """A vLLM engine of a model, and the model's tokenizer.

    Args:
        name: Hub id or folder of a whole model.
        dtype: of the weights; "auto" is vLLM's choice, which makes 16 bits of float32.
        options: further arguments of `vllm.LLM`, for example `tensor_parallel_size`.

    Raises:
        UsageError: vLLM is not installed, or the folder holds a LoRA adapter.
    """
    if (Path(name) / "adapter_config.json").exists():
        base = json.loads((Path(name) / "adapter_config.json").read_text())["base_model_name_or_path"]
        raise UsageError(
            f"--backend vllm reads whole models, and {name} is a LoRA adapter of {base}. Save the model that PEFT's "
            "`merge_and_unload()` returns and name its folder, or use --backend transformers."
        )
    try:
        from vllm import LLM
    except ImportError as error:
        raise UsageError(
            f"--backend vllm: vLLM cannot be imported ({error}). Install it with `pip install 'trl-opsd[vllm]'`, or "
            "use --backend transformers."
        ) from error
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    stops = stop_tokens(tokenizer, _generation_config(name))
    return Engine(LLM(model=name, dtype=dtype, **(options or {})), stops), tokenizer


def generate_completions(
    model: Engine,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 1024,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt with a vLLM engine.

    Args:
        model: of [`load_engine`].
        tokenizer, prompts, num_samples, temperature, top_p, top_k, max_new_tokens, chat_template_kwargs, progress: as
            in `generation.generate_completions`.
        seed (`int`): the draws are a function of it as far as the engine's batching does not change its numbers.

    Returns:
        `list[list[Completion]]`: one list of `num_samples` per prompt, in the order of `prompts`.
    """
    import numpy as np
    from vllm import SamplingParams

    check_sampling(num_samples, temperature)
    # One for each question: with a common seed all questions would share their draws.
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts)).tolist()
    settings = {
        "n": num_samples,
        "temperature": temperature,
        "top_p": top_p if temperature > 0 else 1.0,
        "top_k": (top_k if temperature > 0 else 0) or -1,
        "max_tokens": max_new_tokens,
        "stop_token_ids": sorted(model.stops),
        "detokenize": False,
    }
    outputs = model.llm.generate(
        [{"prompt_token_ids": render_prompt(tokenizer, prompt, chat_template_kwargs)} for prompt in prompts],
        [SamplingParams(seed=own, **settings) for own in seeds],
        use_tqdm=progress,
    )
    return [
        [read_completion(list(sample.token_ids), model.stops, tokenizer) for sample in output.outputs]
        for output in outputs
    ]


def _generation_config(name: str) -> Any:
    """What transformers would read the stop tokens from."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(name))
