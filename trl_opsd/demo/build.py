# SPDX-License-Identifier: Apache-2.0
"""Makes the embedded demo model from nothing.

`python -m trl_opsd.demo.build [--output DIR] [--seed 0] [--steps N]`.
`python -m trl_opsd.demo.build --hard --output DIR` goes on from the shipped model with chains of eight to ten operations.
Same seed, steps, thread count and machine type: same bytes.
"""

import argparse
import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from . import model_path
from .corpus import FORMAT_SHARES, LAST_FORMAT_SHARES, LATE_FORMAT_SHARES, Example, draw_example
from .measure import format_results, longest_attempt, measure
from .task import HARD_NUM_OPERATIONS, NUM_OPERATIONS
from .tokenizer import build_tokenizer

DEFAULT_STEPS = 2000
HARD_STEPS = 400  # from the shipped model on, which knows the arithmetic
BATCH_SIZE = 64
BATCHES_PER_DRAW = 8  # drawn together and sorted by length, so that a batch holds little padding
MUON_LEARNING_RATE = 1e-2  # matrices; half the steps of AdamW on this task
ADAMW_LEARNING_RATE = 5e-3  # embeddings and norms
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.01
IGNORED = -100


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own warm-up and decay.

    Attributes:
        shares: of the examples' formats.
        steps: number of batches, as a share of the first phase's.
        learning_rate: as a share of the first phase's.
        distilled: learn from the model as the phase found it, given the turn that says as much, not from the text.
    """

    shares: Mapping[str, float]
    steps: float = 1.0
    learning_rate: float = 1.0
    distilled: bool = False


PHASES = (
    Phase(FORMAT_SHARES),
    Phase(LATE_FORMAT_SHARES, 0.4, 0.5),
    Phase(LATE_FORMAT_SHARES, 0.4, 0.25),
    Phase(LAST_FORMAT_SHARES, 0.4, 0.25),
    Phase(LAST_FORMAT_SHARES, 0.2, 0.08, distilled=True),
)

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Written-out arithmetic, Qwen3 architecture, 0.9M parameters

The embedded demo model of `trl_opsd`: it solves chains of {chains} operations step by step, and has a bad
habit in the plain prompt, slips that mostly go unnoticed, which a reference solution in the prompt ends.
It is good for nothing else.
Made from {start} by `python -m trl_opsd.demo.build --seed {seed} --steps {steps}{options}`; no outside data.

Validation problems, four samples each at temperature 1 where not greedy:

{table}
"""


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of about 0.9M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def tokenize(user: str, example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of a user turn, the example's answer and eos, and the labels: `IGNORED` where the text is only read."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}],
        add_generation_prompt=True,
        enable_thinking=example.thinking,
        return_dict=False,
    )
    answer = tokenizer._tokenizer.encode("".join(text for text, _ in example.pieces), add_special_tokens=False)
    trained = [flag for text, flag in example.pieces for _ in text]
    ids = [*prompt, *answer.ids, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt)
    labels += [
        token if trained[begin] else IGNORED for token, (begin, _) in zip(answer.ids, answer.offsets, strict=True)
    ]
    return ids, [*labels, tokenizer.eos_token_id]


def draw_batches(
    tokenizer: PreTrainedTokenizerFast,
    generator: random.Random,
    shares: Mapping[str, float] = FORMAT_SHARES,
    num_operations: Sequence[int] = NUM_OPERATIONS,
) -> list[list[Example]]:
    """Draws `BATCHES_PER_DRAW` batches of examples of like length."""
    examples = [draw_example(generator, shares, num_operations) for _ in range(BATCH_SIZE * BATCHES_PER_DRAW)]
    examples.sort(key=lambda example: len(tokenize(example.user, example, tokenizer)[0]))
    batches = [examples[start : start + BATCH_SIZE] for start in range(0, len(examples), BATCH_SIZE)]
    generator.shuffle(batches)
    return batches


def answer_logits(
    model: Qwen3ForCausalLM,
    users: Sequence[str],
    batch: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and ids (N,) at the batch's trained tokens, each example behind its user turn."""
    rows = [tokenize(user, example, tokenizer) for user, example in zip(users, batch, strict=True)]
    ids = pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad_sequence([torch.tensor(row) for _, row in rows], batch_first=True, padding_value=IGNORED)[:, 1:]
    # Padding stands on the right of a causal model: no position that is trained on can see it.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
    kept = labels != IGNORED
    return model.lm_head(hidden[kept]), labels[kept]


def build_optimizers(model: Qwen3ForCausalLM, learning_rate_share: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and the norms."""
    muon, adamw = (rate * learning_rate_share for rate in (MUON_LEARNING_RATE, ADAMW_LEARNING_RATE))
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = set(matrices)
    rest = [weight for weight in model.parameters() if weight not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adamw, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_at(step: int, num_steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero."""
    warmup = min(WARMUP_STEPS, num_steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def train(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, num_steps: int, hard: bool = False, progress: bool = True
) -> Qwen3ForCausalLM:
    """Trains a fresh model, or for longer chains the shipped one, through all phases, `num_steps` batches in the first."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(model_path()) if hard else build_model(tokenizer)
    lengths = HARD_NUM_OPERATIONS if hard else NUM_OPERATIONS
    for number, phase in enumerate(PHASES, start=1):
        draws = f"build/{seed}" if number == 1 else f"build/{seed}/{number}"
        train_phase(model, tokenizer, phase, draws, int(phase.steps * num_steps), lengths, progress=progress)
    return model.eval()


def train_phase(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    phase: Phase,
    seed: str,
    num_steps: int,
    num_operations: Sequence[int] = NUM_OPERATIONS,
    *,
    progress: bool = True,
) -> None:
    """Trains `model` in place on `num_steps` batches of one phase, of chains of these lengths, drawn with `seed`."""
    start = copy.deepcopy(model).eval() if phase.distilled else None
    model.train()
    generator = random.Random(seed)
    optimizers = build_optimizers(model, phase.learning_rate)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate_at(step, num_steps)) for optimizer in optimizers]
    batches: list[list[Example]] = []
    bar = tqdm(range(num_steps), desc="building the demo model", disable=not progress)
    for step in bar:
        batches = batches or draw_batches(tokenizer, generator, phase.shares, num_operations)
        batch = batches.pop()
        logits, target = answer_logits(model, [example.user for example in batch], batch, tokenizer)
        if start is not None:
            with torch.no_grad():
                target = answer_logits(start, [example.alike for example in batch], batch, tokenizer)[0].softmax(-1)
        loss = cross_entropy(logits, target)
        take_step(model, loss, optimizers, schedules)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def take_step(
    model: torch.nn.Module,
    loss: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    schedules: Sequence[LambdaLR],
) -> None:
    """One clipped step of all optimizers and their schedules."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, card: str, max_new_tokens: int
) -> None:
    """Writes weights, tokenizer, generation settings and the card."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for weights in output.glob("*.safetensors"):
        weights.chmod(0o644)  # they are package data, for every user to read
    (output / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the model; without --hard that of the shipped one")
    parser.add_argument("--hard", action="store_true", help="chains of 8 to 10 operations, from the shipped model on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"of the first phase; {DEFAULT_STEPS}, with --hard {HARD_STEPS}")
    parser.add_argument("--problems", type=int, default=300, help="validation problems of the closing measurement")
    parser.add_argument("--threads", type=int, default=1, help="a different count rounds differently")
    options = parser.parse_args(arguments)
    if options.hard and options.output is None:
        parser.error("--hard needs --output: the shipped model's folder is not for another one.")
    torch.set_num_threads(options.threads)
    steps = options.steps or (HARD_STEPS if options.hard else DEFAULT_STEPS)
    lengths = HARD_NUM_OPERATIONS if options.hard else NUM_OPERATIONS
    tokenizer = build_tokenizer()
    model = train(tokenizer, seed=options.seed, num_steps=steps, hard=options.hard)
    table = format_results(measure(model, tokenizer, num_problems=options.problems, num_operations=lengths))
    print(table)
    about = {"chains": "eight to ten", "start": "the shipped one", "options": " --hard"}
    about = about if options.hard else {"chains": "two to four", "start": "nothing", "options": ""}
    card = CARD.format(seed=options.seed, steps=steps, table=table, **about)
    save(model, tokenizer, options.output or Path(model_path()), card, longest_attempt(lengths))


if __name__ == "__main__":
    main()
