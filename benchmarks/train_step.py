# SPDX-License-Identifier: Apache-2.0
"""Whole optimizer steps of `OPSDTrainer` and of TRL's trainers: seconds, memory and loss, full weights, AdamW.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --model 100M --rollouts given

Contenders, each in a process of its own, in turn within each repeat:
  ours           `OPSDTrainer`, forward KL without clip: the mathematics of sdft-full
  ours-clipped   the same with OPSD's clip
  sdft-full      TRL's experimental `SDFTTrainer`, `full_logits`, alpha 0, which is forward KL
  sdft-topk      the same on the student's 100 likeliest tokens
  distillation   TRL's `DistillationTrainer`, beta 0: the teacher is a second model and reads the student's prompt alone
  gkd            TRL's experimental `GKDTrainer`, the same teacher and divergence
  grpo           TRL's `GRPOTrainer`, 8 rollouts a prompt (or all of a smaller step's), a reward without cost, no teacher
  paper          the trainer that the OPSD paper's authors published, forward KL; runs only where `--paper_python` and
                 `--paper_repo` name an environment with its pins and a checkout (see paper_trainer.py)
The self-teachers (ours, sdft, paper) are the initial weights, paper's those of the step, and read prompt and solution;
`--generations` above 1 gives them so many rollouts a prompt, and ours then reads each context once.

All start from one file of weights, read the same prompts in the same order, sample and compare at temperature 1 (GKD's
loss knows no other) and keep their defaults elsewhere. With `--rollouts given`, `generate` only appends completions that
are drawn from the prompt, so that scoring, loss and optimizer are timed; with `sampled` it generates, and no rollout may
end before its last token. Solutions hold no answer, so no contender verifies one.

One JSON line per contender, then a table of ratios to ours:
  seconds            between the ends of two steps, data, logs and callbacks included; warm-up steps are not counted
  cpu_seconds        what the process computed in them, all threads together: less shaken than seconds by other work on
                     the machine
  tokens_per_second  completion tokens of a step over its median seconds
  peak_extra_mb      the highest of the run above what was held when model and trainer had been built: gradients and
                     AdamW's moments are in it, and equal for all
  loss_peak_mb       the highest between the student's last hidden states and their gradient, above what was held at the
                     first: logits, what the loss keeps of them, the gradient of the head, and the teacher's forward
                     where it runs there; in the last warm-up step
  loss               of the first step, all micro-batches
Memory is the kernel's high-water mark of the resident memory on a CPU (Linux), what torch allocated on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "true")

import torch
from datasets import Dataset
from memory import config_of
from steps import SAMPLING, GivenRollouts, load, make_rows, make_settings, measure_steps
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.demo import model_path
from trl_opsd.experimental.planning.footprint import load_config

# Rollouts a micro-batch, micro-batches a step, tokens, and rollouts that the self-teachers take of a prompt.
SHAPES = {
    "demo": {"batch": 8, "accumulation": 1, "prompt": 32, "solution": 64, "completion": 64, "generations": 1},
    "100M": {"batch": 2, "accumulation": 1, "prompt": 128, "solution": 256, "completion": 128, "generations": 1},
    "qwen3-1.7b": {
        "batch": 4,
        "accumulation": 2,
        "prompt": 256,
        "solution": 1024,
        "completion": 1024,
        "generations": 1,
    },
    "qwen3-4b": {"batch": 2, "accumulation": 4, "prompt": 256, "solution": 1024, "completion": 1024, "generations": 1},
}
QWEN3 = {"qwen3-1.7b": "Qwen3-1.7B", "qwen3-4b": "Qwen3-4B"}


def ours(case, common, rows, tokenizer, clip):
    from trl_opsd import OPSDConfig, OPSDTrainer

    args = OPSDConfig(
        **common,
        **SAMPLING,
        max_completion_length=case["completion"],
        num_generations=case["generations"],
        clip=clip,
        teacher_prompt_template="{prompt}\n\n{solution}",
    )
    return OPSDTrainer(
        load(case["student"]), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def sdft(case, common, rows, tokenizer, mode):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(
        **common,
        **SAMPLING,
        max_completion_length=case["completion"],
        max_prompt_length=None,
        num_generations=case["generations"],
        distillation_mode=mode,
        distillation_alpha=0.0,
        teacher_prompt_template="{prompt}\n\n{privileged_context}",
    )
    dataset = Dataset.from_list(rows).rename_column("solution", "privileged_context")
    return SDFTTrainer(load(case["student"]), args=args, train_dataset=dataset, processing_class=tokenizer)


def distillation(case, common, rows, tokenizer):
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(**common, **SAMPLING, max_completion_length=case["completion"], beta=0.0)
    return DistillationTrainer(
        load(case["student"]),
        load(case["teacher"]),
        args=args,
        train_dataset=Dataset.from_list(rows).select_columns("prompt"),
        processing_class=tokenizer,
    )


def gkd(case, common, rows, tokenizer):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(
        **common,
        train_sampling_strategy="sequential",
        max_new_tokens=case["completion"],
        temperature=SAMPLING["temperature"],
        lmbda=1.0,
        beta=0.0,
    )
    return GKDTrainer(
        load(case["student"]),
        load(case["teacher"]),
        args=args,
        data_collator=partial(collate_for_gkd, tokenizer, GivenRollouts(tokenizer, case["completion"])),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def collate_for_gkd(tokenizer, rollouts, rows):
    """Prompts padded on the left; completions are there because GKD counts the tokens of its loss before it samples."""
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    sequences = rollouts(ids, mask)
    labels = sequences.clone()
    labels[:, : ids.size(1)] = -100
    return {
        "input_ids": sequences,
        "attention_mask": torch.cat([mask, torch.ones_like(labels[:, ids.size(1) :])], dim=1),
        "labels": labels,
        "prompts": ids,
        "prompt_attention_mask": mask,
    }


def grpo(case, common, rows, tokenizer):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids, **_):
        return [float(ids[0] % 2) for ids in completion_ids]

    args = GRPOConfig(
        **common,
        **SAMPLING,
        max_completion_length=case["completion"],
        num_generations=min(8, case["batch"] * case["accumulation"]),
    )
    return GRPOTrainer(
        load(case["student"]), reward, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


CONTENDERS = {
    "ours": partial(ours, clip=None),
    "ours-clipped": partial(ours, clip="upper"),
    "sdft-full": partial(sdft, mode="full_logits"),
    "sdft-topk": partial(sdft, mode="topk_logits"),
    "distillation": distillation,
    "gkd": gkd,
    "grpo": grpo,
}
PAPER = "paper"
SECOND_MODEL = ("distillation", "gkd")


def measure(case):
    """Train the case's steps; prints a JSON line of what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"])
    trainer = CONTENDERS[case["what"]](case, make_settings(case), make_rows(case), tokenizer)
    measure_steps(trainer, tokenizer, case)


def prepare(model, contenders, folder):
    """Folders of the student's weights and of the second model's, random but for the demo's student."""
    config = load_config(QWEN3[model]) if model in QWEN3 else config_of(model)
    folders = {}
    for seed, name in enumerate(("student", "teacher")):
        folders[name] = f"{folder}/{name}"
        if name == "student" and model == "demo":
            folders[name] = str(model_path())
        elif name == "student" or set(contenders) & set(SECOND_MODEL):
            torch.manual_seed(seed)
            # To halve the file; every contender trains in float32.
            dtype = torch.bfloat16 if model in QWEN3 else torch.float32
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folders[name])
    return folders


def run(case):
    """One run in a process of its own."""
    worker = [sys.executable, __file__]
    if case["what"] == PAPER:
        worker = [case["paper_python"], Path(__file__).with_name("paper_trainer.py")]
    done = subprocess.run([*worker, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case['what']}:\n{done.stderr[-4000:]}")
    if case["profile"]:
        print(case["what"], done.stderr[done.stderr.index("---") :], sep="\n", file=sys.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))


def summarize(case, runs):
    """The row of one contender from its repeats."""
    seconds = [second for run in runs for second in run["seconds"]]
    median = statistics.median(seconds)
    return {
        "what": case["what"],
        "model": case["model"],
        "rollouts": case["rollouts"],
        "device": torch.cuda.get_device_name() if case["device"] == "cuda" else "cpu",
        "dtype": "bfloat16 autocast" if case["device"] == "cuda" else "float32",
        "threads": runs[0]["threads"],
        "shape": {name: case[name] for name in SHAPES[case["model"]]},
        "repeats": len(runs),
        "steps": len(runs[0]["seconds"]),
        "seconds": {
            "median": round(median, 4),
            "min": round(min(seconds), 4),
            "max": round(max(seconds), 4),
        },
        "cpu_seconds": round(statistics.median(second for run in runs for second in run["cpu_seconds"]), 4),
        "tokens_per_second": round(case["batch"] * case["accumulation"] * case["completion"] / median, 1),
        "peak_extra_mb": round(max(run["peak"] for run in runs) / 2**20, 1),
        "loss_peak_mb": round(max(run["loss_peak"] for run in runs) / 2**20, 1),
        "loss": runs[0]["loss"],
    }


def print_table(rows):
    """Each figure and its ratio to ours (to the first, where ours did not run)."""
    base = next((row for row in rows if row["what"] == "ours"), rows[0])
    print(f"\n{'':13} {'s/step':>8} {'/ ours':>6} {'fastest':>8} {'slowest':>8} {'CPU s':>7} {'/ ours':>6}", end="")
    print(f" {'tokens/s':>8}", end="")
    print(f" {'peak MB':>8} {'/ ours':>6} {'loss MB':>8} {'/ ours':>6} {'loss':>12}")
    for row in rows:
        seconds = row["seconds"]
        print(f"{row['what']:13} {seconds['median']:8.3f} {seconds['median'] / base['seconds']['median']:6.2f}", end="")
        print(f" {seconds['min']:8.3f} {seconds['max']:8.3f}", end="")
        print(f" {row['cpu_seconds']:7.3f} {row['cpu_seconds'] / base['cpu_seconds']:6.2f}", end="")
        print(f" {row['tokens_per_second']:8.1f}", end="")
        for name in ("peak_extra_mb", "loss_peak_mb"):
            ratio = row[name] / base[name] if base[name] else float("nan")
            print(f" {row[name]:8.0f} {ratio:6.2f}", end="")
        print(f" {row['loss']:12.9f}")
    losses = {row["what"]: row["loss"] for row in rows}
    for first, second in (("ours", "sdft-full"), ("ours", PAPER), ("distillation", "gkd")):
        if rows[0]["rollouts"] == "given" and {first, second} <= losses.keys():
            difference = abs(losses[first] / losses[second] - 1)
            print(f"Relative difference of the losses of {first} and {second}: {difference:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="100M", choices=SHAPES)
    parser.add_argument("--rollouts", default="given", choices=("given", "sampled"))
    parser.add_argument("--contenders", nargs="+", choices=(*CONTENDERS, PAPER), help="default: all that can run")
    parser.add_argument("--paper_python", help="Python with what paper_trainer.py names")
    parser.add_argument("--paper_repo", help="checkout of the paper's repository")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run, warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not counted, 1 or more")
    parser.add_argument("--repeats", type=int, default=3)
    for name in SHAPES["demo"]:
        parser.add_argument(f"--{name}", type=int, help="instead of the model's default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="one run of each, with where its operations' time went")
    parser.add_argument("--output", type=Path, help="file that gets the JSON lines too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        return measure(json.loads(options.case))
    has_paper = options.paper_python and options.paper_repo
    options.contenders = options.contenders or [*CONTENDERS, *([PAPER] if has_paper else [])]
    if PAPER in options.contenders and not has_paper:
        parser.error(f"{PAPER} needs --paper_python and --paper_repo")
    if not 1 <= options.warmup < options.steps:
        parser.error("--warmup is to be at least 1 and below --steps")
    with tempfile.TemporaryDirectory() as folder:
        rows = benchmark(options, folder)
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_table(rows)


def benchmark(options, folder):
    """Rows of all contenders, their runs in turn."""
    shape = {name: getattr(options, name) or default for name, default in SHAPES[options.model].items()}
    names = ("model", "rollouts", "steps", "warmup", "device", "profile", "paper_python", "paper_repo")
    settings = {name: getattr(options, name) for name in names}
    folders = {**prepare(options.model, options.contenders, folder), "folder": f"{folder}/run"}
    case = {**settings, **shape, **folders, "tokenizer": str(model_path())}
    runs = {what: [] for what in options.contenders}
    for _ in range(1 if options.profile else options.repeats):
        for what in runs:
            runs[what].append(run({**case, "what": what}))
            print(what, json.dumps(runs[what][-1]), file=sys.stderr, flush=True)
    rows = [summarize({**case, "what": what}, measured) for what, measured in runs.items()]
    print(*map(json.dumps, rows), sep="\n", flush=True)
    return rows


if __name__ == "__main__":
    main()
