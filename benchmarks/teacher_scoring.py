# SPDX-License-Identifier: Apache-2.0
"""Time and tokens of the teacher's scoring of one group of eight rollouts, on a random Qwen3.

    python benchmarks/teacher_scoring.py --contexts 1024,4096 --span 256 --repeats 3

What is scored:
  opsd      one context (problem and solution) on 8 rollouts
  ogls_sd   3 right, 5 wrong and a solution: the problem alone and 9 contexts, each on the 5 wrong rollouts
Ways, in turn within each repeat, so that a busy machine slows both alike:
  plain     every context runs with every rollout
  shared    every context runs once, its KV cache serves all its rollouts
One JSON line per row, then a table of ratios plain / shared. `difference` is the largest of the hidden states, relative
to their largest.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opsd.forwards import TeacherForward
from trl_opsd.heads import attach_head_function
from trl_opsd.jobs import ScoringJob
from trl_opsd.scoring import ContextSharing, score_contexts
from trl_opsd.states import TargetStates

NUM_TOKENS = 512
# Rollouts and contexts of a group; the head is not run, so its size is small.
CASES = {"opsd": (8, 1, False), "ogls_sd": (5, 9, True)}


def make_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A seeded Qwen3 without trained weights, patched to hand out its hidden states."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=NUM_TOKENS,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        attn_implementation=args.attention,
    )
    model = Qwen3ForCausalLM(config).eval().to(args.device, getattr(torch, args.dtype))
    attach_head_function(model)
    return model


def make_jobs(case: str, context: int, args: argparse.Namespace) -> list[ScoringJob]:
    """The jobs of one group, contexts and rollouts of random tokens."""
    num_rollouts, num_contexts, with_problem = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(NUM_TOKENS, (length,), generator=generator).tolist()

    contexts = [draw(context) for _ in range(num_contexts)] + ([draw(args.problem)] if with_problem else [])
    rollouts = [draw(args.span) for _ in range(num_rollouts)]
    return [
        ScoringJob(ids, rollout, row, 1.0 / len(contexts), (-1.0) ** index)
        for index, ids in enumerate(contexts)
        for row, rollout in enumerate(rollouts)
    ]


class CountedForward(TeacherForward):
    """A teacher that counts its forwards."""

    num_forwards = 0

    def _states(self, *args, **settings):
        CountedForward.num_forwards += 1
        return super()._states(*args, **settings)


def measure(model, jobs: list[ScoringJob], shared: bool, args: argparse.Namespace) -> tuple[float, int, TargetStates]:
    """Seconds, forwards and the result of one scoring; the first comparison of both ways is left out."""
    sharing = ContextSharing() if shared else None
    if shared:
        sharing.supported = True
    CountedForward.num_forwards = 0
    start = time.perf_counter()
    target = score_contexts(
        CountedForward(model, model),
        jobs,
        shape=(len({job.row for job in jobs}), args.span, args.hidden),
        dtype=torch.float32,
        device=torch.device(args.device),
        pad_id=0,
        tokens_per_forward=args.budget,
        with_direction=True,
        sharing=sharing,
    )
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, CountedForward.num_forwards, target


def benchmark(model, case: str, context: int, args: argparse.Namespace) -> list[dict]:
    """The rows of one case and context length."""
    jobs, rows, samples = make_jobs(case, context, args), [], {False: [], True: []}
    for _ in range(args.repeats + args.warmup):
        for shared, measured in samples.items():
            measured.append(measure(model, jobs, shared, args))
    plain = samples[False][-1][2].anchor
    difference = (samples[True][-1][2].anchor - plain).abs().max() / plain.abs().max()
    for shared, measured in samples.items():
        seconds = [sample[0] for sample in measured[args.warmup :]]
        rows.append(
            {
                "what": case,
                "way": "shared" if shared else "plain",
                "context": context,
                "span": args.span,
                "model": f"{args.layers}x{args.hidden} {args.dtype} {args.attention}",
                "device": args.device,
                "threads": torch.get_num_threads(),
                "budget": args.budget,
                "median_s": round(statistics.median(seconds), 4),
                "min_s": round(min(seconds), 4),
                "max_s": round(max(seconds), 4),
                "tokens_computed": measured[-1][2].num_tokens,
                "forwards": measured[-1][1],
                "difference": difference.item(),
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    """Plain and shared side by side with the ratios of tokens and of time."""
    print(f"\n{'what':8} {'context':>7} {'span':>5} {'tokens plain':>12} {'shared':>8} {'ratio':>6}", end="")
    print(f" {'plain s':>8} {'shared s':>8} {'ratio':>6} {'fastest':>7} {'difference':>10}")
    for plain, shared in zip(rows[::2], rows[1::2], strict=True):
        print(f"{plain['what']:8} {plain['context']:7} {plain['span']:5} {plain['tokens_computed']:12}", end="")
        print(f" {shared['tokens_computed']:8} {plain['tokens_computed'] / shared['tokens_computed']:6.2f}", end="")
        print(
            f" {plain['median_s']:8.3f} {shared['median_s']:8.3f} {plain['median_s'] / shared['median_s']:6.2f}", end=""
        )
        print(f" {plain['min_s'] / shared['min_s']:7.2f} {shared['difference']:10.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,4096", help="context lengths in tokens, comma separated")
    parser.add_argument("--span", type=int, default=256, help="scored tokens of each rollout")
    parser.add_argument("--problem", type=int, default=128, help="tokens of the problem alone")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--budget", type=int, default=32_768, help="teacher_tokens_per_forward")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="first repeats that are not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, rows = make_model(args), []
    for case in CASES:
        for context in map(int, args.contexts.split(",")):
            new = benchmark(model, case, context, args)
            print(*map(json.dumps, new), sep="\n", flush=True)
            rows += new
    print_table(rows)


if __name__ == "__main__":
    main()
