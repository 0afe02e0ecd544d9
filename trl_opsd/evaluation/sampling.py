# SPDX-License-Identifier: Apache-2.0
"""Completions of prompts by transformers: `model.generate` in batches padded on the left, as a function of a seed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

Prompt = str | list[dict[str, Any]]


class Completion(NamedTuple):
    """One sampled answer: text without special tokens, length with the eos token, whether it has none."""

    text: str
    num_tokens: int
    is_cut: bool


def render_prompt(tokenizer, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt; a conversation goes through the chat template, up to the answer."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(
        tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **(chat_template_kwargs or {}),
        )
    )


def generate_completions(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 1024,
    batch_size: int = 128,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[list[Completion]]:
    """Samples `num_samples` completions of every prompt with `model.generate`.

    Args:
        model: a causal language model; the train or eval state of each of its modules is restored.
        tokenizer: its tokenizer, with a pad token.
        prompts (`Sequence`): texts or conversations.
        num_samples (`int`): completions per prompt, 1 or more; more than one needs `temperature` above 0.
        temperature (`float`): 0 decodes greedily.
        top_p (`float`): nucleus mass in (0, 1].
        top_k (`int`): 0 keeps all tokens.
        max_new_tokens (`int`): length limit of a completion.
        batch_size (`int`): sequences generated at once; prompts go longest first, padded on the left.
        chat_template_kwargs (`Mapping`, *optional*): for example `{"enable_thinking": False}`.
        seed (`int`): the draws are a function of it; the caller's random state is left as it was.
        progress (`bool`): shows a progress bar.

    Returns:
        `list[list[Completion]]`: one list of `num_samples` per prompt, in the order of `prompts`.
    """
    import torch
    from tqdm import tqdm

    check_sampling(num_samples, temperature)
    rendered = [render_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    order = sorted(range(len(rendered)), key=lambda index: -len(rendered[index]))
    prompts_at_once = max(1, batch_size // num_samples)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling |= {"max_new_tokens": max_new_tokens, "num_return_sequences": num_samples}
    completions: list[list[Completion]] = [[] for _ in rendered]
    with evaluation_mode(model), torch.random.fork_rng(_accelerators(model)), torch.no_grad():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(order), prompts_at_once), desc="generating", disable=not progress):
            batch = order[start : start + prompts_at_once]
            samples = _generate_batch(model, tokenizer, [rendered[index] for index in batch], sampling)
            for position, index in enumerate(batch):
                completions[index] = samples[position * num_samples : (position + 1) * num_samples]
    return completions


def check_sampling(num_samples: int, temperature: float) -> None:
    """Refuse several samples of a greedy decoding, which would be copies."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; set it to 1 or more.")
    if num_samples > 1 and temperature == 0:
        raise ValueError(f"num_samples is {num_samples} at temperature 0; set num_samples=1 or a temperature above 0.")


def read_completion(ids: list[int], stops: set[int], tokenizer) -> Completion:
    """The completion that new token ids are, up to the first of the tokens `stops`."""
    length = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
    is_cut = not any(token in stops for token in ids)
    return Completion(tokenizer.decode(ids[:length], skip_special_tokens=True), length, is_cut)


def stop_tokens(tokenizer, generation_config) -> set[int]:
    """Tokens that end a completion: the tokenizer's and the generation config's."""
    stops = {tokenizer.eos_token_id, *np.atleast_1d(generation_config.eos_token_id).tolist()}
    return stops - {None}


def _accelerators(model) -> list[int]:
    """What `fork_rng` has to look at beside the CPU; left to itself it warns on a machine with several."""
    return [] if model.device.type == "cpu" else [model.device.index or 0]


@contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """The time in which no module of a model trains; each has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _generate_batch(model, tokenizer, rendered: list[list[int]], sampling: Mapping[str, Any]) -> list[Completion]:
    import torch

    width = max(map(len, rendered))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rendered])  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rendered])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    stops = stop_tokens(tokenizer, model.generation_config)
    return [read_completion(row, stops, tokenizer) for row in output[:, width:].tolist()]
