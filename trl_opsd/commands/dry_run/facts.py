# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: thinking, batch, groups, steps, lengths and parameters."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from ...card import thinking_modes
from ...experimental.planning.memory import GIB
from ...experimental.planning.workload import Workload
from ...methods import Method
from ...methods.privileged import PrivilegedText
from ...methods.stand_in import stand_in, work_lines
from ..arguments import given_value, option_value, read_command_line
from ..launch import accelerate_config_path
from ..plan import Planned, read_engine
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


def run_facts(
    args: Any, processes: int, dataset_size: int | None, method: Method, row: dict[str, Any]
) -> list[tuple[str, str]]:
    """Thinking, batch, steps, loss, and what is read and written of a rollout of `row`, a line each."""
    modes = {role: _THINKING[mode] for role, mode in thinking_modes(args).items()}
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    generated = args.per_device_train_batch_size * args.steps_per_generation * processes
    steps = f"{args.max_steps} optimizer steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    if args.max_steps > 0 and dataset_size:
        epochs = args.max_steps * step / args.num_generations / dataset_size
        steps += f", {epochs:.2g} epochs of {dataset_size} rows"
    clip = f"clip {args.clip} {args.clip_value}" if args.clip else "no clip"
    measured = f"{args.divergence}, {clip}, " if method.has_target else ""
    distilled, horizon = str(args.distillation_length_at(None) or args.max_completion_length), args.horizon()
    if horizon is not None:
        distilled = f"{horizon.start} to {distilled} (over {horizon.steps} steps)"
    brought = PrivilegedText(method, args).describe(row)
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
        ("loss", f"{measured}temperature {args.loss_temperature}; teacher {args.teacher_model_kind}"),
        *([("by row", f"the teacher also reads {brought}")] if brought else []),
        *work_lines(method, args, stand_in(method, args, row)),
    ]


def model_facts(
    config: Any, model_args: Any, views: list[list[View]], args: Any, name: str, arguments: Sequence[str]
) -> list[tuple[str, str]]:
    """The longest prompts, parameters and what a GPU holds; the weights are counted, not loaded."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    size = f"{count / 1e9:.3g}B" if count > 1e9 else f"{count / 1e6:.3g}M"
    longest = {is_student: 0 for is_student in (True, False)}
    for view in (view for row in views for view in row):
        longest[view.name == "student"] = max(longest[view.name == "student"], len(view.ids))
    workload = Workload(longest[True], max(0, longest[False] - longest[True]))
    try:
        planned = _planned(config, model_args, args, name, arguments, workload)
    except ValueError as error:
        planned = f"not planned: {error}"
    return [
        ("prompts", f"longest of {len(views)} rows: student {longest[True]} tokens, teacher {longest[False]}"),
        ("memory", f"{size} parameters; {planned}"),
    ]


def _planned(config: Any, model_args: Any, args: Any, name: str, arguments: Sequence[str], workload: Workload) -> str:
    """Total on each GPU and the largest part of it."""
    bf16 = str(given_value(arguments, "bf16")).lower() != "false"  # the parser here was told not to need it
    launcher = read_command_line(arguments, argument_types(name)).launcher
    chosen = option_value(launcher, "accelerate_config")
    path = None if chosen is None else str(accelerate_config_path(chosen))
    engine, num_gpus = read_engine(path, num_processes(arguments, name))
    run = Planned(config, args, name, get_peft_config(model_args), model_args.dtype, bf16, workload)
    plan = run.plan(engine, num_gpus)
    largest = max(
        (part for part in plan.parts if part.phase in ("always", plan.peak_phase)), key=lambda part: part.bytes
    )
    return (
        f"{plan.total / GIB:.3g} GiB on each GPU ({engine}, peak in {plan.peak_phase}), "
        f"most for {largest.name}: {largest.bytes / GIB:.3g}"
    )
