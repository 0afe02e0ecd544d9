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
from functools import partial
from typing import Any

import torch
from measuring import Sample, emit, machine, measure, summary
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opsd.model.heads import attach_head_function
from trl_opsd.teacher.forwards import TeacherForward
from trl_opsd.teacher.jobs import ScoringJob
from trl_opsd.teacher.scoring import ContextSharing, score_contexts
from trl_opsd.teacher.states import TargetStates

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


def make_jobs(
    num_rollouts: int, num_contexts: int, with_problem: bool, context: int, args: argparse.Namespace
) -> list[ScoringJob]:
    """The jobs of one group, contexts and rollouts of random tokens."""
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
    """A teacher that counts its forwards and the tokens they run, padding included."""

    num_forwards = num_tokens = 0

    def _states(self, ids, *args, **settings):
        self.num_forwards += 1
        self.num_tokens += ids.numel()
        return super()._states(ids, *args, **settings)


def run_scoring(
    teacher: TeacherForward, jobs: list[ScoringJob], args: argparse.Namespace, **settings: Any
) -> TargetStates:
    """The targets of jobs whose rollouts have `args.span` tokens."""
    return score_contexts(
        teacher,
        jobs,
        TargetStates.empty(
            (len({job.row for job in jobs}), args.span, args.hidden),
            torch.float32,
            torch.device(args.device),
            with_direction=True,
        ),
        device=torch.device(args.device),
        pad_id=0,
        tokens_per_forward=args.budget,
        **settings,
    )


def score(model, jobs: list[ScoringJob], shared: bool, args: argparse.Namespace) -> tuple[Sample, int]:
    """One scoring, measured, and its forwards; the first comparison of both ways is left out."""
    sharing = ContextSharing() if shared else None
    if shared:
        sharing.supported = True
    teacher = CountedForward(model, model)
    run = partial(run_scoring, teacher, jobs, args, sharing=sharing)
    return measure(run, args.device), teacher.num_forwards


def benchmark(model, case: str, context: int, args: argparse.Namespace) -> list[dict]:
    """The rows of one case and context length."""
    jobs, rows, samples = make_jobs(*CASES[case], context, args), [], {False: [], True: []}
    for _ in range(args.repeats + args.warmup):
        for shared, measured in samples.items():
            measured.append(score(model, jobs, shared, args))
    targets = {shared: measured[-1][0].result for shared, measured in samples.items()}
    plain = targets[False].anchor
    difference = (targets[True].anchor - plain).abs().max() / plain.abs().max()
    for shared, measured in samples.items():
        rows.append(
            {
                "what": case,
                "way": "shared" if shared else "plain",
                "context": context,
                "span": args.span,
                "model": f"{args.layers}x{args.hidden} {args.dtype} {args.attention}",
                "budget": args.budget,
                **machine(args.device),
                **summary([sample for sample, _ in measured[args.warmup :]]),
                "tokens_computed": targets[shared].num_tokens,
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
            emit(new, None)
            rows += new
    print_table(rows)


if __name__ == "__main__":
    main()
