# SPDX-License-Identifier: Apache-2.0
"""Makes a tiny masked-diffusion language model of written-out arithmetic, on which d-OPSD can be tried.

`python -m trl_opsd.demo.masked --output DIR [--seed 0] [--steps N]`.

A bidirectional ModernBERT of 0.7M parameters learns to fill in masked tokens of solutions of the embedded task. A share of the
answer's positions, drawn anew for each example, is masked, and a masked token weighs one over that share (LLaDA, arXiv
2502.09992). Behind its end an answer is filled up with the end token, which is how such a model says that it is done.
"""

import argparse
import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from .build import build_optimizers, learning_rate_at, take_step
from .task import Problem, draw_problem_of
from .tokenizer import build_tokenizer

NUM_OPERATIONS = (2,)
COMPLETION_LENGTH = 24  # the longest answer of two operations has 21 tokens with its end
DEFAULT_STEPS = 1000
BATCH_SIZE = 128
LEAST_SHARE = 0.05  # of masked positions: one over it bounds the weight of a token


def build_masked_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's tokenizer with a mask token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return tokenizer


def build_masked_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, num_layers: int = 4
) -> ModernBertForMaskedLM:
    """A fresh ModernBERT with full attention in every layer and no dropout.

    Args:
        tokenizer: with a mask token; its length is the vocabulary.
        hidden_size: width, a multiple of 32.
        num_layers: layers, 1 or more.
    """
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=512,
        global_attn_every_n_layers=1,
        initializer_range=0.05,
        initializer_cutoff_factor=3.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    return ModernBertForMaskedLM(config)


def encode_example(problem: Problem, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids of a problem's prompt and of its answer, filled up with the end token to `COMPLETION_LENGTH`."""
    messages = [{"role": "user", "content": problem.question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
    return list(prompt), [*answer, *[tokenizer.eos_token_id] * (COMPLETION_LENGTH - len(answer))]


def draw_batch(
    tokenizer: PreTrainedTokenizerFast, generator: random.Random, batch_size: int = BATCH_SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws examples of equal prompt length, so that no batch holds padding.

    Returns:
        Ids (B, S), which of them may be masked (B, S), and the share (B, 1) that shall be.
    """
    examples: dict[int, list[list[int]]] = {}
    while True:
        prompt, answer = encode_example(draw_problem_of("pretraining", generator, NUM_OPERATIONS), tokenizer)
        alike = examples.setdefault(len(prompt), [])
        alike.append(prompt + answer)
        if len(alike) == batch_size:
            break
    ids = torch.tensor(alike)
    maskable = (torch.arange(ids.size(1)) >= len(prompt)).expand_as(ids)
    share = torch.tensor([[generator.uniform(LEAST_SHARE, 1.0)] for _ in alike])
    return ids, maskable, share


def denoising_loss(
    model: ModernBertForMaskedLM,
    ids: torch.Tensor,
    maskable: torch.Tensor,
    share: torch.Tensor,
    mask_token_id: int,
) -> torch.Tensor:
    """Cross-entropy of the masked tokens over the share that is masked, a mean over positions that may be."""
    masked = maskable & (torch.rand(ids.shape) < share)
    logits = model(input_ids=ids.masked_fill(masked, mask_token_id)).logits
    losses = cross_entropy(logits[masked].float(), ids[masked], reduction="none")
    return (losses / share.expand_as(ids)[masked]).sum() / maskable.sum()


def train(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, num_steps: int = DEFAULT_STEPS, progress: bool = True
) -> ModernBertForMaskedLM:
    """Trains a fresh model on `num_steps` batches, drawn with `seed`."""
    torch.manual_seed(seed)
    generator = random.Random(f"diffusion/{seed}")
    model = build_masked_model(tokenizer).train()
    optimizers = build_optimizers(model)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate_at(step, num_steps)) for optimizer in optimizers]
    bar = tqdm(range(num_steps), desc="building the masked model", disable=not progress)
    for step in bar:
        batch = draw_batch(tokenizer, generator)
        loss = denoising_loss(model, *batch, tokenizer.mask_token_id)
        take_step(model, loss, optimizers, schedules)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Trains and saves model and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--threads", type=int, default=1, help="a different count rounds differently")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer = build_masked_tokenizer()
    train(tokenizer, seed=options.seed, num_steps=options.steps).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
