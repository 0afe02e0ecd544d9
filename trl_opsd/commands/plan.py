# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd plan`: what a run needs on each GPU, whether it fits, and the nearest setting that does.

`trl-opsd plan --write-docs` writes the tables of docs/scale.md.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from trl import get_peft_config

from ..experimental.planning.footprint import SHAPES, Footprint, load_config, measure_footprint
from ..experimental.planning.memory import GIB, MemoryPlan, plan_memory
from ..experimental.planning.workload import ENGINES, Workload
from ..methods.stand_in import stand_in, work_lines
from .plan_options import make_parser
from .train import TRAINERS, parse_as_one_of

NUM_GPUS = (1, 4, 8, 64)
DOCS_METHODS = ("opsd", "ogls-sd", "purified-opsd")
LORA = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.05, target_modules="all-linear")
_FOOTPRINTS: dict[tuple, Footprint] = {}
_ARGUMENTS: dict[str, Any] = {}
_MARKS = ("<!-- table of `trl-opsd plan --write-docs` begins -->\n", "<!-- table ends -->\n")


def main(arguments: list[str]) -> None:
    """Print the plan of a run, or write the docs' tables."""
    options, rest = make_parser().parse_known_args(arguments)
    if options.write_docs:
        write_docs(Path(options.write_docs))
        return
    engine, num_gpus = read_engine(options.accelerate_config, options.num_gpus)
    args, model_args = _run_arguments(options.method, rest, num_gpus)
    if model_args.model_name_or_path is None:
        raise ValueError(f"model_name_or_path is not set; give a model's folder or one of {SHAPES}.")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise ValueError(
                f"{name}=True: the planner counts weights of `dtype` alone. Leave it out for what the rest needs."
            )
    run = Planned(
        load_config(model_args.model_name_or_path),
        args,
        options.method,
        get_peft_config(model_args),
        model_args.dtype,
        options.precision == "bf16",
        Workload(options.prompt_tokens, options.solution_tokens),
        options.gpu_gib,
    )
    print(f"{model_args.model_name_or_path}, {options.method}, {num_gpus} GPUs, {engine}\n")
    print(as_table(run.plan(engine, num_gpus)))
    method = TRAINERS[options.method].method
    print("\nOf each rollout, beside sampling it and the student's forward:")
    for label, text in work_lines(method, args, stand_in(method, args, most=args.num_generations)):
        print(f"  {label:11}{text}")
    print(verdict(run, engine, num_gpus))


def _run_arguments(method: str, arguments: list[str], num_gpus: int = 1) -> tuple[Any, Any]:
    """The run's settings, read on any machine: a laptop without a GPU would refuse `bf16`."""
    words = ["--output_dir", "plan", *arguments]
    _, args, model_args = parse_as_one_of(num_gpus, method, words, "--bf16=false", "--use_cpu=true")
    return args, model_args


def read_engine(name: str | None, num_gpus: int | None) -> tuple[str, int]:
    """Engine and number of GPUs from a name of `ENGINES` or a file of accelerate.

    Raises:
        ValueError: neither an engine nor a file, or a file of an engine that is not planned.
    """
    if name is None or name in ENGINES:
        return name or ("single" if (num_gpus or 1) == 1 else "ddp"), num_gpus or 1
    if not Path(name).is_file():
        raise ValueError(f"accelerate_config={name!r} is neither a file nor one of {ENGINES}.")
    settings = yaml.safe_load(Path(name).read_text())
    kind = settings.get("distributed_type", "NO")
    stage = (settings.get("deepspeed_config") or {}).get("zero_stage")
    engine = {"DEEPSPEED": f"zero{stage}", "FSDP": "fsdp2", "NO": "single"}.get(kind, "ddp")
    if engine not in ENGINES:
        raise ValueError(f"accelerate_config={name!r} has zero_stage={stage}; planned are {ENGINES}.")
    return engine, num_gpus or settings.get("num_processes", 1)


class Planned:
    """A run that can be planned under several engines.

    Args:
        config: the model's.
        args: the trainer's config.
        method: a name of `TRAINERS`.
        peft_config: of the adapter, or None.
        dtype: of the weights, a name as in `--dtype`.
        bf16: whether it computes in bfloat16.
        workload: lengths of texts.
        gpu_gib: memory of one GPU.
    """

    def __init__(self, config, args, method, peft_config, dtype, bf16, workload, gpu_gib=80.0):
        self.config, self.args, self.method, self.peft_config = config, args, method, peft_config
        self.dtype = getattr(torch, dtype if dtype not in (None, "auto") else "float32")
        self.bf16, self.workload, self.gpu_gib = bf16, workload, gpu_gib

    def plan(self, engine: str, num_gpus: int) -> MemoryPlan:
        """The plan on `num_gpus` under `engine`."""
        return plan_memory(
            self._footprint(engine),
            self.args,
            TRAINERS[self.method].method,
            engine=engine,
            num_gpus=num_gpus,
            gpu_bytes=self.gpu_gib * GIB,
            workload=self.workload,
            autocast=self.bf16,
        )

    def fits(self, engine: str, num_gpus: int) -> bool:
        """Whether it fits into a GPU."""
        return self.plan(engine, num_gpus).total <= self.gpu_gib * GIB

    def changed(self, **settings: Any) -> "Planned":
        """The same run with other settings of the trainer, or another `peft_config` and `dtype`."""
        other = copy.copy(self)
        other.peft_config = settings.pop("peft_config", self.peft_config)
        other.dtype = settings.pop("dtype", self.dtype)
        other.args = copy.copy(self.args)
        for name, value in settings.items():
            setattr(other.args, name, value)
        return other

    def _footprint(self, engine: str) -> Footprint:
        split = engine in ("zero2", "zero3", "fsdp2") and self.bf16  # these hold or gather bfloat16, without autocast
        dtype, autocast = (torch.bfloat16, False) if split else (self.dtype, self.bf16)
        key = (self.config.to_json_string(), repr(self.peft_config), dtype, autocast)
        if key not in _FOOTPRINTS:
            _FOOTPRINTS[key] = measure_footprint(self.config, dtype, autocast=autocast, peft_config=self.peft_config)
        if engine != "fsdp2":
            return _FOOTPRINTS[key]
        trained = 4 if self.peft_config is not None else self.dtype.itemsize  # shards stay in the model's own dtype
        return replace(_FOOTPRINTS[key], parameter_bytes=self.dtype.itemsize, adapter_bytes=trained)


def as_table(plan: MemoryPlan) -> str:
    """The parts of a plan as a Markdown table in GiB."""
    phases = ("always", "sampling", "scoring", "training")
    rows = [
        f"| {part.phase} | {part.name} | {part.bytes / GIB:.2f} |"
        for phase in phases
        for part in plan.parts
        if part.phase == phase
    ]
    peak = f"| **peak** | always and {plan.peak_phase} | **{plan.total / GIB:.2f}** |"
    return "\n".join(["| phase | part | GiB on each GPU |", "|---|---|---|", *rows, peak])


def verdict(run: Planned, engine: str, num_gpus: int) -> str:
    """Whether the run fits, and if not the first change, or the fewest in a row, with which it does."""
    if run.fits(engine, num_gpus):
        return f"\nFits into {run.gpu_gib:g} GiB."
    changes = _changes(run, engine, num_gpus)
    for name, changed, other, gpus in changes:
        if changed.fits(other, gpus):
            return f"\nDoes not fit into {run.gpu_gib:g} GiB. It does with {name}."
    made, names = run, []
    for _ in range(len(changes)):
        for name, changed, other, gpus in _changes(made, engine, num_gpus):
            if name not in names:
                names.append(name)
                made, engine, num_gpus = changed, other, gpus
                break
        if made.fits(engine, num_gpus):
            return f"\nDoes not fit into {run.gpu_gib:g} GiB. It does with {' and '.join(names)}."
    return (
        f"\nDoes not fit into {run.gpu_gib:g} GiB, and with none of the settings tried here. Use more or larger GPUs."
    )


def _changes(run: Planned, engine: str, num_gpus: int) -> list[tuple[str, Planned, str, int]]:
    """What may be changed, that which changes least of the run first; each with its engine and number of GPUs."""
    args, found = run.args, []
    if not args.gradient_checkpointing:
        found.append(("gradient_checkpointing=True", run.changed(gradient_checkpointing=True), engine, num_gpus))
    if args.per_device_train_batch_size > 1:
        size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps * size}
        smaller = run.changed(**settings, steps_per_generation=args.steps_per_generation * size)
        found.append((" and ".join(f"{k}={v}" for k, v in settings.items()), smaller, engine, num_gpus))
    if args.teacher_tokens_per_forward > 8192:
        fewer = run.changed(teacher_tokens_per_forward=8192)
        found.append(("teacher_tokens_per_forward=8192", fewer, engine, num_gpus))
    if not args.use_vllm:
        found.append(("a vLLM server", run.changed(use_vllm=True, vllm_mode="server"), engine, num_gpus))
    for other in ("zero2", "zero3"):
        if num_gpus > 1 and ENGINES.index(engine) < ENGINES.index(other):
            found.append((f"the engine {other}", run, other, num_gpus))
    if run.peft_config is None:
        adapter = run.changed(peft_config=LORA, dtype=torch.bfloat16)
        found.append(("--use_peft --lora_r 64 --dtype bfloat16", adapter, engine, num_gpus))
    several = "zero3" if engine == "single" else engine
    found += [
        (f"{count} GPUs under {several}", run, several, count) for count in (4, 8, 16, 32, 64) if count > num_gpus
    ]
    return found


# The tables of docs/scale.md


def paper_run(shape: str, method: str, num_gpus: int, *, lora: bool) -> Planned:
    """A paper's setting on a shape of `SHAPES`: 32 rollouts a step over all GPUs, at least one on each."""
    rollouts = max(1, 32 // num_gpus)
    size = min(4, rollouts)
    if method not in _ARGUMENTS:
        _ARGUMENTS[method] = _run_arguments(method, [])[0]
    steps = rollouts // size
    args = copy.copy(_ARGUMENTS[method])  # set afterwards: on one process TRL would want whole groups
    args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation = size, steps, steps
    dtype = "bfloat16" if lora else "float32"
    return Planned(load_config(shape), args, method, LORA if lora else None, dtype, True, Workload())


def docs_table(lora: bool) -> str:
    """GiB on each GPU in the papers' settings, by the engine that splits least and fits into 80 GiB."""
    lines = ["| model | GPUs | " + " | ".join(DOCS_METHODS) + " |", "|---|---|" + "---|" * len(DOCS_METHODS)]
    for shape in SHAPES:
        for num_gpus in NUM_GPUS:
            cells = [_cell(paper_run(shape, method, num_gpus, lora=lora), num_gpus) for method in DOCS_METHODS]
            lines.append(f"| {shape} | {num_gpus} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(run: Planned, num_gpus: int) -> str:
    engines = ("single",) if num_gpus == 1 else ("ddp", "zero2", "zero3")
    served = run.changed(use_vllm=True, vllm_mode="server")
    for note, candidate in (("", run), (" with a vLLM server", served)):
        for engine in engines:
            total = candidate.plan(engine, num_gpus).total
            if total <= run.gpu_gib * GIB:
                return f"{engine}{note} {total / GIB:.0f}"
    return f"no: {served.plan(engines[-1], num_gpus).total / GIB:.0f}"


def docs_tables() -> str:
    """Both tables, as they stand between the marks of docs/scale.md."""
    return f"\nLoRA r 64 on every linear layer, base in bfloat16:\n\n{docs_table(True)}\nAll weights, in float32:\n\n{docs_table(False)}\n"


def write_docs(page: Path) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text()
    start, end = (text.index(mark) for mark in _MARKS)
    page.write_text(text[: start + len(_MARKS[0])] + docs_tables() + text[end:])
