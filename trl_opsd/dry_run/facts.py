# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: thinking, batch, groups, steps, lengths and parameters."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from ..arguments import option_value, read_command_line
from ..card import thinking_modes
from ..launch import accelerate_config_path
from ..train import argument_types
from .views import View

_THINKING = {True: "on", False: "off", None: "as the template has it"}


def num_processes(arguments: Sequence[str], name: str) -> int:
    """Processes that the launcher would start, by its options or its config; 1 without a launcher."""
    launcher = read_command_line(arguments, argument_types(name)).launcher
    given = option_value(launcher, "num_processes")
    config = option_value(launcher, "accelerate_config")
    if given is None and config is not None:
        with open(accelerate_config_path(config), encoding="utf-8") as file:
            given = yaml.safe_load(file).get("num_processes")
    return int(given or os.environ.get("WORLD_SIZE", 1))


def run_facts(args: Any, processes: int, dataset_size: int | None) -> list[tuple[str, str]]:
    """Thinking, batch, steps and loss, a line each."""
    modes = {role: _THINKING[mode] for role, mode in thinking_modes(args).items()}
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    generated = args.per_device_train_batch_size * args.steps_per_generation * processes
    if generated % args.num_generations:
        raise ValueError(
            f"num_generations={args.num_generations} does not divide the generation batch of {generated} rollouts "
            f"({args.per_device_train_batch_size} per device x {args.steps_per_generation} x {processes} processes). Change "
            "per_device_train_batch_size or gradient_accumulation_steps."
        )
    steps = f"{args.max_steps} optimizer steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    if args.max_steps > 0 and dataset_size:
        epochs = args.max_steps * step / args.num_generations / dataset_size
        steps += f", {epochs:.2g} epochs of {dataset_size} rows"
    clip = f"clip {args.clip} {args.clip_value}" if args.clip else "no clip"
    distilled = args.distillation_length or args.max_completion_length
    return [
        (
            "thinking",
            f"student {modes['student']}, teacher {modes['teacher']}, evaluation {modes['student']} (the student's)",
        ),
        (
            "batch",
            f"{step} rollouts a step = {args.per_device_train_batch_size} per device x "
            f"{args.gradient_accumulation_steps} accumulation x {processes} process{'es' * (processes > 1)}",
        ),
        ("groups", f"{generated // args.num_generations} prompts x {args.num_generations} rollouts a generation batch"),
        ("steps", steps),
        (
            "rollouts",
            f"up to {args.max_completion_length} tokens at temperature {args.temperature}; first {distilled} distilled",
        ),
        ("loss", f"{args.divergence}, {clip}, temperature {args.loss_temperature}; teacher {args.teacher_model_kind}"),
    ]


def model_facts(config: Any, model_args: Any, views: list[list[View]], args: Any) -> list[tuple[str, str]]:
    """Parameters and the longest prompts; the weights are counted, not loaded."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    lora = model_args.use_peft
    copies = 1 if lora or args.teacher_model_kind == "live" else 2
    trained = "adapter and its optimizer on top" if lora else "gradients and AdamW on top, 12 to 16 bytes a parameter"
    longest = {is_student: 0 for is_student in (True, False)}
    for view in (view for row in views for view in row):
        longest[view.name == "student"] = max(longest[view.name == "student"], len(view.ids))
    weights = f"{2 * copies * count / 1e9:.3g} GB of weights in bf16 ({copies} cop{'y' if copies == 1 else 'ies'})"
    return [
        ("prompts", f"longest of {len(views)} rows: student {longest[True]} tokens, teacher {longest[False]}"),
        ("memory", f"{count / 1e9:.3g}B parameters, {weights}; {trained}"),
    ]
