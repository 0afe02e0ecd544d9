# SPDX-License-Identifier: Apache-2.0
"""Planned against measured peak memory of a training run, each in a process of its own.

`python benchmarks/memory.py` prints one JSON line a run and a table. Each first trains a step of a model of a few thousand
parameters, so that what libraries load is not counted. On a CPU the peak is then the kernel's high-water mark of the resident
memory above that, reset at every phase (Linux); on a GPU `torch.cuda.max_memory_allocated`.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
from itertools import product

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "true")

from measuring import PhasePeaks

MODELS = ("demo", "100M")


def config_of(name):
    from transformers import AutoConfig, Qwen3Config

    from trl_opsd.demo import model_path

    if name == "demo":
        return AutoConfig.from_pretrained(model_path())
    return Qwen3Config(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=3072,
        vocab_size=65_536,
        tie_word_embeddings=False,
    )


def measure(case):
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from trl_opsd import OPSDConfig
    from trl_opsd.demo import model_path
    from trl_opsd.experimental.planning.footprint import measure_footprint
    from trl_opsd.experimental.planning.memory import plan_memory
    from trl_opsd.experimental.planning.workload import Workload
    from trl_opsd.methods import OPSD
    from trl_opsd.teacher.contexts import Moment, Rollout
    from trl_opsd.teacher.prompts import TeacherCollator

    cuda = torch.cuda.is_available()
    config, tokenizer = config_of(case["model"]), AutoTokenizer.from_pretrained(model_path())
    peft_config = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.05, target_modules="all-linear")
    peft_config = peft_config if case["lora"] else None
    # Of several lengths, because only a padded batch has an attention mask.
    rows = [{"prompt": "1" * (60 - index % 4), "solution": "2" * 20} for index in range(16)]
    args = OPSDConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=2,
        max_steps=2,
        max_completion_length=case["completion"],
        gradient_checkpointing=case["checkpointing"],
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    footprint = measure_footprint(config, torch.float32, autocast=cuda, peft_config=peft_config)
    collator = TeacherCollator.from_settings(tokenizer, args)
    context = max(
        len(collator.encode(row["prompt"], view).ids)
        for row in rows
        for view in OPSD.contexts([Rollout(row["prompt"], row["solution"], "")], args, Moment(random.Random(0)))[0]
    )
    prompt = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    planned = plan_memory(
        footprint,
        args,
        OPSD,
        workload=Workload(prompt=prompt, solution=context - prompt),
        autocast=cuda,
        device="cuda" if cuda else "cpu",
    )
    torch.manual_seed(0)
    small = copy.deepcopy(config_of("demo"))
    small.update(
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    )
    warm_up = copy.deepcopy(args)
    warm_up.max_steps, warm_up.max_completion_length = 1, 8
    train(small, warm_up, rows, tokenizer, peft_config)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    watch = PhasePeaks("cpu")
    train(config, args, rows, tokenizer, peft_config, watch)
    phases = {name: round(held / 2**20, 1) for name, held in watch.phases.items()}
    measured = torch.cuda.max_memory_allocated() if cuda else max(watch.phases.values())
    parts = {f"{part.phase}: {part.name}": round(part.bytes / 2**20, 1) for part in planned.parts}
    line = {**case, "planned_mb": round(planned.total / 2**20, 1), "measured_mb": round(measured / 2**20, 1)}
    line |= {
        "prompt": prompt,
        "context": context,
        "ratio": round(planned.total / measured, 2),
        "peak_phase": planned.peak_phase,
        "parts": parts,
        "phases": phases,
    }
    print(json.dumps(line), flush=True)


def train(config, args, rows, tokenizer, peft_config, watch=None):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from trl_opsd import OPSDTrainer

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    trainer = OPSDTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )
    del model
    if watch is not None:
        follow_phases(trainer, watch)
    trainer.generation_config.eos_token_id = None
    trainer.generation_config.min_new_tokens = args.max_completion_length
    trainer.train()
    if watch is not None:
        watch.enter("end")


def follow_phases(trainer, watch):
    def within(owner, name, phase):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            before = watch.phase
            watch.enter(phase)
            try:
                return original(*args, **kwargs)
            finally:
                watch.enter(before)

        setattr(owner, name, call)

    within(trainer, "_generate_single_turn", "sampling")
    within(trainer, "_run_teacher", "scoring")
    within(trainer, "training_step", "training")
    watch.enter("step and rest")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--trained", nargs="+", default=("all", "lora"), choices=("all", "lora"))
    parser.add_argument("--checkpointing", nargs="+", default=("off", "on"), choices=("off", "on"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        return measure(json.loads(options.case))
    lines = []
    for model, lora, checkpointing in product(
        options.models, [name == "lora" for name in options.trained], [name == "on" for name in options.checkpointing]
    ):
        case = {"model": model, "lora": lora, "checkpointing": checkpointing}
        case |= {"batch": 8, "completion": 128} if model == "demo" else {"batch": 1, "completion": 32}
        lines.append(run(case))
    print(
        "| model | trained | checkpointing | planned MB | measured MB | planned / measured |\n|---|---|---|---|---|---|"
    )
    for line in lines:
        trained = "LoRA r64" if line["lora"] else "all"
        flag = "on" if line["checkpointing"] else "off"
        print(
            f"| {line['model']} | {trained} | {flag} | {line['planned_mb']:,.0f} | {line['measured_mb']:,.0f} | {line['ratio']} |"
        )


def run(case):
    # Without a threshold glibc keeps freed blocks and the resident memory never falls.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"model"'))
    print(line, flush=True)
    return json.loads(line)


if __name__ == "__main__":
    main()
