# SPDX-License-Identifier: Apache-2.0
"""One training run on given rollouts, started by a launcher on one or more processes; rank 0 writes its numbers."""

import argparse
import copy
import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"], os.environ["CI"] = "1", "true"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from engines import GLOBAL_BATCH, make_model, make_rows
from peft import LoraConfig
from transformers import TrainerCallback

from trl_opsd.commands.train import TRAINERS, finish
from trl_opsd.demo.tokenizer import build_tokenizer

TEXTS = ("1+2=3", "so 4", "wait, 10 it is", "a")


def give_rollouts(trainer):
    """Completions are a function of prompt and place in the group, so every split over ranks has the same ones."""

    def sample(prompt_ids, *args, **kwargs):
        tokenizer = trainer.tokenizer
        first = trainer.accelerator.process_index * len(prompt_ids)
        places = [(first + row) % trainer.num_generations for row in range(len(prompt_ids))]
        texts = [TEXTS[(len(ids) + place) % len(TEXTS)] for ids, place in zip(prompt_ids, places, strict=True)]
        return [
            tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts
        ], None

    trainer._generate_single_turn = sample


def reward_short(completions, **kwargs):
    """Right where the completion is short: one or two of a group of four."""
    return [float(len(completion[0]["content"]) < 6) for completion in completions]


def reward_all(completions, **kwargs):
    return [1.0] * len(completions)


class Fault(TrainerCallback):
    """Something goes wrong on the last rank in the fourth step, or while its checkpoint is saved; two steps share a batch."""

    STEP = 4

    def __init__(self, trainer, kind):
        self.trainer, self.kind = trainer, kind
        own_rank = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1
        if kind is not None and own_rank:
            trainer.add_callback(self)
            method = {
                "kill-weights-saved": "_save_optimizer_and_scheduler",
                "kill-almost-saved": "save_extra_state",
                "raise-in-reward": "_calculate_rewards",
                "raise-in-teacher": "_score",
                "raise-in-save": "save_extra_state",
            }.get(kind)
            if method is not None:
                self.inject(method)

    def inject(self, method):
        original = getattr(self.trainer, method)

        def faulty(*args, **kwargs):
            if self.trainer.state.global_step == self.STEP:
                self.happen()
            return original(*args, **kwargs)

        setattr(self.trainer, method, faulty)

    def happen(self):
        print(f"\nfault at {time.time()}", file=sys.stderr, flush=True)
        if self.kind.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"injected: {self.kind}")

    def on_substep_end(self, args, state, control, **kwargs):
        if self.kind == "kill-in-step" and state.global_step == self.STEP - 1:
            self.happen()

    def on_step_end(self, args, state, control, **kwargs):
        if self.kind == "kill-after-step" and state.global_step == self.STEP:
            self.happen()


def engine_of(trainer):
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return {"NO": "single", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp"}[trainer.accelerator.distributed_type.name]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", default="opsd", choices=TRAINERS)
    parser.add_argument("--kind", default="base")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--all-right", action="store_true", help="leave OGLS-SD nothing to train on")
    parser.add_argument("--generate", action="store_true", help="sample rollouts instead of the given ones")
    parser.add_argument("--fault", help="see `Fault`")
    parser.add_argument("--save", action="store_true", help="save every step of six, two steps a generation batch")
    # TRL shuffles a generation batch on each process by itself, so what a step of two has depends on their number.
    parser.add_argument("--own-batches", action="store_true", help="a generation batch for each step")
    parser.add_argument("--resume", action="store_true", help="from the newest complete checkpoint")
    options = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = 2 if world < GLOBAL_BATCH else 1  # the batch is the same on one process, two and four
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    trainer_class = TRAINERS[options.method]
    group = {"num_generations": GLOBAL_BATCH, "distillation_length": None} if options.method == "ogls-sd" else {}
    args = trainer_class.config_class(
        **group,
        output_dir=str(options.output / "out"),
        per_device_train_batch_size=GLOBAL_BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=6 if options.save else 3,
        steps_per_generation=accumulation * (2 if options.save and not options.own_batches else 1),
        learning_rate=1e-2,
        max_grad_norm=1.0,
        max_completion_length=8,
        logging_steps=1,
        save_strategy="steps" if options.save else "no",
        save_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        teacher_model_kind=options.kind,
        teacher_update_rate=0.5,
    )
    trainer = trainer_class(
        reward_funcs=reward_all if options.all_right else reward_short,
        model=make_model(tokenizer, options.tied),
        args=args,
        train_dataset=make_rows(),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if options.lora else None,
    )
    if not options.generate:
        give_rollouts(trainer)
    Fault(trainer, options.fault)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.output / "model"))
    keys = ("loss", "grad_norm", "divergence", "student_entropy", "target_entropy")
    history = [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "divergence" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.accelerator.is_main_process:
        run = {"engine": engine_of(trainer), "world": trainer.accelerator.num_processes}
        numbers = {**run, "history": history, "losses": losses}
        (options.output / "numbers.json").write_text(json.dumps(numbers))
    finish(trainer)


if __name__ == "__main__":
    main()
