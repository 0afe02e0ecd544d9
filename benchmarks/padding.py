# SPDX-License-Identifier: Apache-2.0
"""Positions that the student computes for each real token, and seconds a step, with rows by length and without.

    OMP_NUM_THREADS=1 python benchmarks/padding.py --rows 32 --batch 4 --median 150 --sigma 0.8 --cap 1024

A small random Qwen3 trains on rollouts whose lengths are drawn from a lognormal distribution and cut at `--cap`. Ways, in turn
within each step, on the same rollouts and from the same shuffle:
  padded     every micro-batch as wide as the generation batch's longest rollout, as TRL splits it
  cut        rows as they come, each micro-batch cut to its own longest
  by length  rows of the optimizer step by length, each micro-batch cut (what the trainers do)
`--regroup off` leaves the last one out. `--ranks 8` trains nothing, and counts what the slowest of 8 ranks computes in a step of
`--rows` rollouts on each, over the mean rank's real tokens, where rows keep their ranks and where they change them. Only the student is timed: its forwards, the loss, the backward; the teacher has scored
before. One JSON line a way, then ratios. `positions` counts prompt and rollout in the student's forwards, `tokens` those that are
no padding; `difference` is the gradient's, over its norm, to padded's.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import MethodType

import torch
from datasets import Dataset
from measuring import emit, machine
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.demo import model_path
from trl_opsd.trainers import lengths as arranging
from trl_opsd.trainers.lengths import Lengths, by_length, shares_of_ranks

LETTERS = "bcdfghjklmnpqrstvwxz"  # one token each


def padded(trainer, batches):
    return batches


def cut(trainer, batches):
    return by_length(batches, regroups=False, reads_whole=False)


WAYS = {"padded": padded, "cut": cut, "by length": OPSDTrainer.arrange_rows}


def draw_lengths(args, draw, count):
    return [min(args.cap, math.ceil(draw.lognormvariate(math.log(args.median), args.sigma))) for _ in range(count)]


def slowest_rank(args, steps=300):
    """Means over drawn steps: positions of the slowest rank over the mean rank's tokens, each way, and the rows that change ranks."""
    draw, sums = random.Random(args.seed), dict.fromkeys(("padded", "own rows", "over ranks", "moved"), 0.0)
    threshold = arranging.WORTH_MOVING
    for _ in range(steps):
        rows = [Lengths(args.prompt, size, size, 0) for size in draw_lengths(args, draw, args.ranks * args.rows)]
        real = sum(args.prompt + row.rollout for row in rows) / args.ranks
        sums["padded"] += args.rows * (args.prompt + max(row.rollout for row in rows)) / real
        for way, share in (("own rows", 1.0), ("over ranks", threshold)):
            arranging.WORTH_MOVING = share
            ranks = shares_of_ranks(rows, args.ranks, args.batch, True)
            widths = [[args.prompt + max(rows[row].rollout for row in own) for own in groups] for groups in ranks]
            sums[way] += args.batch * max(map(sum, widths)) / real
        moved = [row // args.rows != rank for rank, groups in enumerate(ranks) for own in groups for row in own]
        sums["moved"] += sum(moved) / len(moved)
    return {way: value / steps for way, value in sums.items()}


def make_trainer(args):
    """A trainer whose rollouts are letters of drawn lengths."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 64, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=args.vocabulary, **sizes, **heads)).to(args.device)
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(LETTERS, k=args.prompt)), "solution": "b"} for _ in range(args.rows)]
    config = OPSDConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.rows // args.batch,
        max_completion_length=args.cap,
        teacher_prompt_template="{prompt}{solution}",
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = OPSDTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    letters, lengths = tokenizer(LETTERS)["input_ids"], random.Random(args.seed)

    def sample(prompts, *_, **__):
        sizes = draw_lengths(args, lengths, len(prompts))
        return [draw.choices(letters, k=size) for size in sizes], None

    trainer._generate_single_turn = sample
    return trainer, rows


def split(trainer, rows, seed):
    """A scored generation batch as TRL splits it."""
    trainer.arrange_rows = MethodType(padded, trainer)
    trainer._buffered_inputs, trainer._step = None, 0
    torch.manual_seed(seed)
    trainer._prepare_inputs(list(rows))
    own = ("distilled_positions",)  # of the padded micro-batches
    return [{name: part for name, part in batch.items() if name not in own} for batch in trainer._buffered_inputs]


def run_step(trainer, batches, way, device):
    """Seconds and CPU seconds of an optimizer step's micro-batches, the positions computed and the flat gradient."""
    trainer.arrange_rows = MethodType(WAYS[way], trainer)
    batches, positions = [dict(batch) for batch in batches], []
    hook = trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.model.zero_grad()
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer._prepare_window(batches)
    for batch in batches:
        trainer.compute_loss(trainer.model, batch).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start, time.process_time() - cpu_start
    hook.remove()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    return seconds, sum(positions), gradient


def measure(args):
    """Of each way the seconds of each step, positions and real tokens of all, and the largest difference of a gradient."""
    trainer, rows = make_trainer(args)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    ways = [way for way in WAYS if args.regroup == "on" or way != "by length"]
    found = {way: {"seconds": [], "positions": 0, "tokens": 0, "difference": 0.0} for way in ways}
    for step in range(args.steps + 1):
        batches = split(trainer, rows, step)
        tokens = sum(int(batch[f"{part}_mask"].sum()) for batch in batches for part in ("prompt", "completion"))
        reference = None
        for way, numbers in found.items():
            seconds, positions, gradient = run_step(trainer, batches, way, args.device)
            reference = gradient if reference is None else reference
            if step == 0:  # warms up
                continue
            numbers["seconds"].append(seconds)
            numbers["positions"] += positions
            numbers["tokens"] += tokens
            difference = ((gradient - reference).norm() / reference.norm()).item()
            numbers["difference"] = max(numbers["difference"], difference)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rollouts of an optimizer step; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=4, help="rollouts of a micro-batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--median", type=float, default=150, help="tokens of a rollout")
    parser.add_argument("--sigma", type=float, default=0.8, help="deviation of the logarithm of a rollout's length")
    parser.add_argument("--cap", type=int, default=1024, help="longest rollout in tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=4096, help="at least the demo tokenizer's 109")
    parser.add_argument("--steps", type=int, default=3, help="counted ones; one more warms up")
    parser.add_argument("--regroup", choices=("on", "off"), default="on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="a file that the lines are appended to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args(argv)
    if args.ranks > 1:
        print(json.dumps({"ranks": args.ranks, "rows": args.rows, "batch": args.batch, **slowest_rank(args)}))
        return
    lines = []
    for way, numbers in measure(args).items():
        ratio = numbers["positions"] / numbers["tokens"]
        seconds, cpu_seconds = zip(*numbers.pop("seconds"), strict=True)
        times = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
        times["cpu_s"] = statistics.median(cpu_seconds)
        lines.append({"way": way, **machine(args.device), **numbers, "positions_per_token": ratio, **times})
    emit(lines, args.output)
    print(
        "\n| way | positions / tokens | s/step | padded / | CPU s | padded / | difference |\n|---|---|---|---|---|---|---|"
    )
    for line in lines:
        print(f"| {line['way']} | {line['positions_per_token']:.2f} |", end="")
        for name in ("median_s", "cpu_s"):
            print(f" {line[name]:.2f} | {lines[0][name] / line[name]:.2f} |", end="")
        print(f" {line['difference']:.1e} |")


if __name__ == "__main__":
    main()
