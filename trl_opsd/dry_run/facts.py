# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: thinking, batch, groups, steps, lengths and parameters."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from ..arguments import option_value, read_command_line, read_recipe
from ..card import thinking_modes
from ..launch import accelerate_config_path
from ..train import TRAINERS, argument_types
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


def as_one_process(arguments: Sequence[str], name: str, processes: int) -> list[str]:
    """Words that make a parser in this one process see the batches of all of them: accumulation times processes."""
    recipe = option_value(arguments, "config")
    chosen = read_recipe(recipe) if recipe is not None else {}
    words = []
    for field in ("gradient_accumulation_steps", "steps_per_generation"):
        default = TRAINERS[name].config_class.__dataclass_fields__[field].default
        value = option_value(arguments, field) or chosen.get(field, default)
        if value is not None:
            words.append(f"--{field}={int(value) * processes}")
    return words


def run_facts(args: Any, processes: int, dataset_size: int | None) -> list[tuple[str, str]]:
    """Thinking, batch, steps and loss, a line each."""
    modes = {role: _THINKING[mode] for role, mode in thinking_modes(args).items()}
    # The parser was shown one process with the batches of all (`as_one_process`).
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    generated = args.per_device_train_batch_size * args.steps_per_generation
    accumulation = args.gradient_accumulation_steps // processes
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
            f"{accumulation} accumulation x {processes} process{'es' * (processes > 1)}",
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
    size = f"{count / 1e9:.3g}B" if count > 1e9 else f"{count / 1e6:.3g}M"
    lora = model_args.use_peft
    copies = 1 if lora or args.teacher_model_kind == "live" else 2
    trained = "adapter and its optimizer on top" if lora else "gradients and AdamW on top, 12 to 16 bytes a parameter"
    longest = {is_student: 0 for is_student in (True, False)}
    for view in (view for row in views for view in row):
        longest[view.name == "student"] = max(longest[view.name == "student"], len(view.ids))
    weights = f"{2 * copies * count / 1e9:.3g} GB of weights in bf16 ({copies} cop{'y' if copies == 1 else 'ies'})"
    return [
        ("prompts", f"longest of {len(views)} rows: student {longest[True]} tokens, teacher {longest[False]}"),
        ("memory", f"{size} parameters, {weights}; {trained}"),
    ]
