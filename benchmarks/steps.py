# SPDX-License-Identifier: Apache-2.0
"""What the trainers of `train_step.py` share: rows, rollouts, settings and the measuring of a run.

Imports nothing of trl_opsd and keeps to what transformers 4.57 has too: `paper_trainer.py` runs it with another TRL.
"""

import json
import random
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import torch
from measuring import PhasePeaks, give_back_free_memory, peak
from transformers import AutoModelForCausalLM, TrainerCallback

LETTERS = "bcdfghjklmnpqrstvwxz"  # one token each, and no word that the tokenizer knows
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


class GivenRollouts:
    """Completions drawn from their prompts; called in place of a model's `generate`."""

    def __init__(self, tokenizer, length):
        self.letters, self.length = tokenizer(LETTERS)["input_ids"], length

    def draw(self, prompt, copy=0):
        """Token ids of the completion of a prompt's ids, one for each of its copies."""
        return random.Random(f"{prompt}/{copy}").choices(self.letters, k=self.length)

    def __call__(self, input_ids, attention_mask, return_dict_in_generate=False, **_):
        prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        rows = [self.draw(prompt, prompts[:index].count(prompt)) for index, prompt in enumerate(prompts)]
        ids = torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=1)
        return SimpleNamespace(sequences=ids) if return_dict_in_generate else ids


class PeakMemory(PhasePeaks):
    """Peaks above what was held when this was made, and that of the loss above what was held when it began."""

    loss_bytes = 0

    def enter_loss(self):
        give_back_free_memory()  # what is freed but resident would hide as much of the peak
        self.enter("loss")
        self.held = peak(self.device)

    def leave_loss(self, _):
        self.loss_bytes = max(self.loss_bytes, peak(self.device) - self.held)
        self.enter("rest")


class Probe(TrainerCallback):
    """Times of a run's steps, the losses of its micro-batches, and in the last warm-up step the memory of the loss."""

    def __init__(self, trainer, case):
        self.times, self.losses, self.warmup = [], [], case["warmup"]
        self.cuda = case["device"] == "cuda"
        self.memory = PeakMemory(case["device"])
        self.training_step, trainer.training_step = trainer.training_step, self.keep_loss
        trainer.model.base_model.register_forward_hook(self.after_backbone)
        trainer.add_callback(self)

    def keep_loss(self, *args, **kwargs):
        self.losses.append(self.training_step(*args, **kwargs))
        return self.losses[-1]

    def after_backbone(self, module, inputs, output):
        hidden = output.last_hidden_state
        if hidden.requires_grad and len(self.times) == self.warmup:
            self.memory.enter_loss()
            hidden.register_hook(self.memory.leave_loss)

    def on_train_begin(self, *args, **kwargs):
        self.stamp()

    def on_step_end(self, *args, **kwargs):
        self.stamp()

    def stamp(self):
        if self.cuda:
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))


def make_rows(case):
    """Prompts of several lengths, because only a padded batch has an attention mask, and solutions."""
    draw = random.Random(0)
    count = case["batch"] * case["accumulation"] * case["steps"]
    return [
        {
            "prompt": "".join(draw.choices(LETTERS, k=case["prompt"] - index % 4)),
            "solution": "".join(draw.choices(LETTERS, k=case["solution"])),
        }
        for index in range(count)
    ]


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def make_settings(case):
    """Training arguments that every contender has."""
    cuda = case["device"] == "cuda"
    return {
        "output_dir": case["folder"],
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": case["steps"],
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "shuffle_dataset": False,
        "gradient_checkpointing": cuda,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def measure_steps(trainer, tokenizer, case):
    """Train the case's steps; prints a JSON line of what was measured."""
    if case["rollouts"] == "given":
        trainer.model.generate = GivenRollouts(tokenizer, case["completion"])
    else:
        trainer.generation_config.min_new_tokens = case["completion"]
    probe = Probe(trainer, case)
    with torch.profiler.profile() if case["profile"] else nullcontext() as profile:
        trainer.train()
    if case["profile"]:
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14), file=sys.stderr)
    probe.memory.enter("end")
    seconds, cpu_seconds = (
        [end - start for start, end in pairwise(times)] for times in zip(*probe.times[case["warmup"] :], strict=True)
    )
    line = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": max(probe.memory.phases.values()),
        "loss_peak": probe.memory.loss_bytes,
        "loss": sum(loss.item() for loss in probe.losses[: case["accumulation"]]),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(line), flush=True)
