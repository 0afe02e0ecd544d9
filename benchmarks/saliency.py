# SPDX-License-Identifier: Apache-2.0
"""What masks of the saliency reward find on the embedded model, and what a search costs.

    OMP_NUM_THREADS=1 python benchmarks/saliency.py --problems 8 --starts -2 -5 -8 --rates 1 --prices 0.1 1
    OMP_NUM_THREADS=1 python benchmarks/saliency.py --cost 128 512 2048

The first form solves problems greedily and searches for the masks of the right rollouts with each choice: the answer's loss without
a mask, under the first and under the last one, the reward, and the mean of exp(m) on the last result, which the answer copies, and
on all other tokens. The second form times a step of the search on a random Qwen3 of 42 million parameters, for reasonings of so
many tokens: on the cache of what stands before the tail, as the reward does it, and over the whole sequence. One JSON line a row.
"""

import argparse
import time
from itertools import chain, product
from pathlib import Path

import torch
from measuring import emit, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from trl_opsd.demo import build_rows, model_path
from trl_opsd.evaluation.sampling import generate_completions, render_prompt
from trl_opsd.experimental.atmanrl.cutting import CutRollout, cut_rollout
from trl_opsd.experimental.atmanrl.masking import MaskedReader, find_masks
from trl_opsd.experimental.atmanrl.settings import SaliencySettings
from trl_opsd.verification import verify

THINKING = {"enable_thinking": False}
TAIL = 16


def right_rollouts(model, tokenizer, num_problems: int) -> list[CutRollout]:
    """Greedy solutions of test problems that are right, cut in their parts."""
    rows = build_rows("test", num_problems)
    settings = {"num_samples": 1, "max_new_tokens": 96, "batch_size": 64, "temperature": 0.0}
    groups = generate_completions(
        model, tokenizer, [row["prompt"] for row in rows], chat_template_kwargs=THINKING, **settings
    )
    cut = []
    for row, (sample,) in zip(rows, groups, strict=True):
        if verify(sample.text, row["solution"]):
            ids = tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            prompt = render_prompt(tokenizer, row["prompt"], THINKING)
            cut.append(cut_rollout(tokenizer, prompt, ids, "\\boxed{", 32))
    return [rollout for rollout in cut if rollout is not None]


def shares(tokenizer, rollout: CutRollout, mask: torch.Tensor) -> tuple[list[float], list[float]]:
    """exp(m) on the digits behind the last equals sign, and on every other token of the reasoning."""
    texts = [tokenizer.decode([token]) for token in rollout.reasoning]
    last = len(texts) - 1 - texts[::-1].index("=")
    copied = [index > last and texts[index].isdigit() for index in range(len(texts))]
    left = mask.exp().tolist()
    return [v for v, own in zip(left, copied, strict=True) if own], [
        v for v, own in zip(left, copied, strict=True) if not own
    ]


def choices(options: argparse.Namespace) -> list[dict]:
    """One row for each choice of start, step size and price."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), attn_implementation="sdpa").eval()
    rollouts = right_rollouts(model, tokenizer, options.problems)
    reader, rows = MaskedReader(model, rollouts, tokenizer.pad_token_id), []
    for start, rate, price in product(options.starts, options.rates, options.prices):
        settings = SaliencySettings(mask_start=start, mask_rate=rate, sparsity=price, mask_steps=options.steps)
        began = time.perf_counter()
        found = find_masks(reader, settings)
        seconds = time.perf_counter() - began
        read = [shares(tokenizer, rollout, mask) for rollout, mask in zip(rollouts, found.masks, strict=True)]
        copied, others = (torch.tensor([*chain(*parts)]).mean().item() for parts in zip(*read, strict=True))
        losses = {name: getattr(found, name).mean().item() for name in ("plain_loss", "first_loss", "last_loss")}
        regained = (found.last_loss < 0.1).double().mean().item()
        row = {"start": start, "rate": rate, "price": price, "rollouts": len(rollouts), **losses, "regained": regained}
        rows.append(
            {**row, "reward": found.saliency.mean().item(), "copied": copied, "others": others, "seconds": seconds}
        )
    return rows


def costs(options: argparse.Namespace) -> list[dict]:
    """One row for each length of the reasoning."""
    torch.manual_seed(0)
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**size, **heads)).eval()
    return [cost(model, length, options.steps) for length in options.cost]


def cost(model, length: int, steps: int) -> dict:
    """Seconds of a step on the cache and over the whole sequence, for one rollout of so many tokens and a tail of 16."""
    ids = torch.randint(5, 16000, (64 + length + TAIL,)).tolist()
    rollout = CutRollout(ids[:64], ids[64:-TAIL], ids[-TAIL:], [False] * 4 + [True] * (TAIL - 4))
    began = time.perf_counter()
    reader = MaskedReader(model, [rollout], 0)
    once = time.perf_counter() - began
    began = time.perf_counter()
    find_masks(reader, SaliencySettings(mask_steps=steps))
    on_cache = (time.perf_counter() - began) / steps
    values = torch.zeros(1, len(ids), requires_grad=True)
    hidden = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)
    is_tail = torch.arange(len(ids))[:, None] >= len(ids) - TAIL
    began = time.perf_counter()
    logits = model(torch.tensor([ids]), attention_mask=(hidden + values * is_tail)[None, None]).logits[:, -TAIL:]
    torch.autograd.grad(logits.log_softmax(-1).sum(), values)
    whole = time.perf_counter() - began
    return {
        "reasoning": length,
        "once_s": once,
        "step_s": on_cache,
        "whole_step_s": whole,
        "whole / step": whole / on_cache,
    }


def main(argv: list[str] | None = None) -> None:
    """Print one JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--starts", type=float, nargs="+", default=[-5.0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0])
    parser.add_argument("--prices", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cost", type=int, nargs="+")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    rows = costs(options) if options.cost else choices(options)
    emit([{**row, **machine("cpu")} for row in rows], options.output)


if __name__ == "__main__":
    main()
