# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd inspect`: models, method and settings as the training command takes them, to one HTML page."""

import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from .._trl.versions import trusts_remote_code
from ..card import thinking_modes
from ..checkpoints.state import saved_memory
from ..commands.arguments import CommandParser, check_writable
from ..commands.train import TRAINERS, DataArguments, load_rows, parse_as
from ..methods.controls import controlled, with_other_solutions
from ..settings.data import InspectionSettings
from .compute import Inspector
from .page import write_page
from .records import RolloutRecord, SampledRollout
from .rollouts import sample_groups, saved_groups

# A default of training that a machine without a GPU refuses; nothing here reads it, and words of the user's win.
_NEUTRAL = ("--bf16", "false")
_PROMPTS_PER_ROLLOUT = 8


@dataclass
class InspectArguments(InspectionSettings, DataArguments):
    """What to inspect, and the data."""


def run_inspect(arguments: list[str]) -> Path:
    """Write the page that the command line describes and say where it is.

    Args:
        arguments: words of the command line; `--config` names a recipe, whose settings of training are taken too.

    Raises:
        UsageError: an option or a key of the recipe is not known; names the nearest.
        ValueError: no rollout can be inspected, or an argument is missing.
    """
    finder = CommandParser(add_help=False)
    finder.add_argument("--method", default="opsd", choices=[*TRAINERS])
    method = finder.parse_known_args(arguments)[0].method  # decides which settings there are
    types = (InspectArguments, TRAINERS[method].config_class, ModelConfig)
    inspect_args, settings, model_args = parse_as(types, "inspect", [*_NEUTRAL, *arguments])
    if inspect_args.num_rollouts < 1:
        raise ValueError(f"num_rollouts={inspect_args.num_rollouts} is not valid; set it to 1 or more.")
    check_writable(Path(inspect_args.output).parent)
    inspector = make_inspector(inspect_args, settings, model_args)
    groups = _groups(inspector, inspect_args)
    records, num_seen = take_records(inspector, groups, inspect_args.num_rollouts)
    if not records:
        raise ValueError(
            f"{inspector.method.name} reads none of the {num_seen} rollouts, by reason {dict(inspector.unused)}: a method of "
            "groups needs right and wrong ones, and others the columns that they read. Give other problems, more num_generations, "
            f"or another schedule_step ({inspector.step} now)."
        )
    name = inspector.method.name
    path = write_page(
        inspect_args.output,
        records,
        lambda token: inspector.tokenizer.decode([token]),
        f"{name}: what the teacher says of each token",
        _facts(inspector, inspect_args, model_args.model_name_or_path),
    )
    shown = sum(not record.is_extra for record in records)
    print(f"{path}: {shown} of {num_seen} rollouts, {path.stat().st_size / 1e6:.1f} MB")
    return path


def make_inspector(inspect_args: InspectArguments, settings: Any, model_args: ModelConfig) -> Inspector:
    """Load the base model as the teacher and the checkpoint, if one is named, as the student."""
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is not set. Give the base model, whose weights teach.")
    teacher = _load(model_args.model_name_or_path, model_args, settings, model_args.model_revision)
    student, own = teacher, inspect_args.student_model_name_or_path
    if own is not None:
        student = _load(own, model_args, settings, None)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=trusts_remote_code(settings),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    method = controlled(TRAINERS[inspect_args.method].method, settings)
    return Inspector(
        student,
        teacher,
        tokenizer,
        method,
        settings,
        _step(inspect_args, settings),
        memory=(own and saved_memory(own)) or {},
        average=_average(own, student) if settings.teacher_model_kind == "ema" else None,
    )


def take_records(
    inspector: Inspector, groups: Iterable[list[SampledRollout]], num_rollouts: int
) -> tuple[list[RolloutRecord], int]:
    """Records of the first rollouts that the method reads, with those beside them, and how many were looked at for them."""
    records: list[RolloutRecord] = []
    num_seen = 0
    for group in groups:
        num_seen += len(group)
        records += inspector.inspect_group(group)
        if sum(not record.is_extra for record in records) >= num_rollouts:
            break
    places = [place for place, record in enumerate(records) if not record.is_extra]
    return records[: places[num_rollouts]] if len(places) > num_rollouts else records, num_seen


def _groups(inspector: Inspector, inspect_args: InspectArguments) -> Iterator[list[SampledRollout]]:
    if inspect_args.completions is None:
        rows = _rows(inspector, inspect_args)
        return sample_groups(inspector, itertools.islice(rows, _PROMPTS_PER_ROLLOUT * inspect_args.num_rollouts))
    rows = _rows(inspector, inspect_args) if inspect_args.dataset_name else None
    return saved_groups(inspector, inspect_args.completions, rows)


def _rows(inspector: Inspector, inspect_args: InspectArguments) -> Any:
    rows = load_rows(inspect_args, inspect_args.dataset_train_split)
    return with_other_solutions(rows, inspector.settings, "the dataset")


def _load(name: str, model_args: ModelConfig, settings: Any, revision: str | None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        use_safetensors=True,
        trust_remote_code=trusts_remote_code(settings),
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _step(inspect_args: InspectArguments, settings: Any) -> int:
    """The optimizer step that is shown: the one asked for, the checkpoint's, or the last."""
    if inspect_args.schedule_step is not None:
        return inspect_args.schedule_step
    return _trained_steps(inspect_args.student_model_name_or_path) or settings.max_steps


def _average(checkpoint: str | None, student: torch.nn.Module) -> torch.nn.Module | None:
    """A copy of the student with the moving average that a checkpoint of full fine-tuning holds; None without one."""
    file = Path(checkpoint or "") / "teacher.safetensors"
    if checkpoint is None or not file.exists():
        return None
    values, known = load_file(file), {name for name, _ in student.named_parameters()}
    if not values.keys() <= known:  # of an adapter, whose names are PEFT's
        return None
    average = copy.deepcopy(student)
    average.load_state_dict(values, strict=False)
    return average


def _trained_steps(checkpoint: str | None) -> int | None:
    """Optimizer steps of a checkpoint of HF Trainer, None where the folder does not say."""
    state = Path(checkpoint or "") / "trainer_state.json"
    return json.loads(state.read_text())["global_step"] if checkpoint and state.exists() else None


def _facts_of_method(inspector: Inspector) -> dict[str, Any]:
    """Whose weights teach, and what the page cannot know: the memory of a run, the average of its teacher."""
    kind, method = inspector.settings.teacher_model_kind, inspector.method
    facts = {"teacher's weights": {"base": "initial", "live": "the student's", "ema": "moving average"}[kind]}
    if kind == "ema" and inspector.average is None:
        facts["teacher's weights"] = "initial, in place of a moving average that no checkpoint gave"
    if method.remember is not None:
        known = {name: value for name, value in inspector.memory.items() if isinstance(value, int | float)}
        told = ", ".join(f"{name} {value:.4g}" for name, value in known.items())
        empty = "empty, as before the first batch: give a run's checkpoint as the student"
        facts["memory of the method"] = told or ("read from the checkpoint" if inspector.memory else empty)
    return facts


def _facts(inspector: Inspector, inspect_args: InspectArguments, base: str) -> dict[str, Any]:
    settings = inspector.settings
    thinking = thinking_modes(settings)
    facts = {
        "method": inspector.method.name,
        "teacher": Path(base).name,
        "student": Path(inspect_args.student_model_name_or_path or base).name,
    }
    if inspector.method.has_target:
        facts["divergence"] = settings.divergence
        facts["clip"] = f"{settings.clip} {settings.clip_value}" if settings.clip else "none"
    facts |= {
        "loss temperature": settings.loss_temperature,
        "thinking of student / teacher": " / ".join(str(thinking[role]) for role in ("student", "teacher")),
    } | _facts_of_method(inspector)
    brought = inspector.privileged.describe()
    if brought:
        facts["the teacher also reads, by row"] = brought
    if inspect_args.completions is None:
        return facts | {"rollouts": "sampled from the student for this page"}
    return facts | {"rollouts": f"{Path(inspect_args.completions).name}, tokenized again from their text"}
