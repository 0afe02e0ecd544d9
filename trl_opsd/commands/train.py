# SPDX-License-Identifier: Apache-2.0
"""From arguments to a saved model: what the command line, the demo and the example script share.

`python -m trl_opsd.commands.train NAME ...` is what the command line starts under `accelerate launch`.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from ..errors import UsageError
from ..model.quantized import prepare_quantized
from ..pages import PAGES, trainer_of
from ..rows import champ
from ..rows.files import is_data_file, load_data_file
from ..rows.formats import FORMATS
from ..settings.data import DataSettings
from ..trainers.baselines import BASELINES, baseline_arguments
from ..trainers.checks import check_fills_a_batch, check_trained, warn_of_first_golds
from ..trainers.self_distillation import SelfDistillationTrainer
from .arguments import CommandParser, check_writable, environment_of, given_value, option_value, read_command_line
from .log_file import LogFile
from .recipe_values import check_recipe_values
from .step_lines import show_steps
from .terminal import calm_libraries
from .user_errors import run_for_user

TRAINERS: dict[str, type[SelfDistillationTrainer]] = {name: trainer_of(name) for name in PAGES}


@dataclass
class DataArguments(DataSettings, ScriptArguments):
    """TRL's script arguments, with a name that may be a local file, and the columns to read."""


def load_rows(script_args: DataArguments, split: str) -> Dataset | IterableDataset:
    """Load a split with the columns `prompt` and `solution`.

    Args:
        script_args: what to load.
        split: of the dataset; a local file is one split whatever its name.

    Raises:
        ValueError: no dataset was named, a file cannot be read, a named column is missing, or `dataset_format` is
            unknown.
    """
    if not script_args.dataset_name:
        raise ValueError("dataset_name is not set. Give a Hub id, a folder, or a local JSON, JSONL or Parquet file.")
    if champ.NAME in (script_args.dataset_name, script_args.dataset_format):
        return champ.load_champ(script_args.dataset_name, split)
    if is_data_file(script_args.dataset_name):
        rows = load_data_file(script_args.dataset_name, streaming=script_args.dataset_streaming)
    else:
        rows = load_dataset(
            script_args.dataset_name,
            name=script_args.dataset_config,
            split=split,
            streaming=script_args.dataset_streaming,
        )
    if script_args.dataset_format is not None:
        if script_args.dataset_format not in FORMATS:
            names = ", ".join([*FORMATS, champ.NAME])
            raise ValueError(f"dataset_format={script_args.dataset_format!r} is not one of {names}.")
        return rows.map(FORMATS[script_args.dataset_format], remove_columns=rows.column_names)
    for name, value in (
        ("problem_column", script_args.problem_column),
        ("solution_column", script_args.solution_column),
    ):
        if value is not None and rows.column_names is not None and value not in rows.column_names:
            raise ValueError(f"{name}={value!r} is not a column of {script_args.dataset_name}: {rows.column_names}.")
    if script_args.problem_column is not None:
        column = script_args.problem_column
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row[column]}]})
    if script_args.solution_column != "solution":
        # Copied, not renamed: a reward function may read the column by its own name.
        rows = rows.map(lambda row: {"solution": row[script_args.solution_column]})
    return rows


def make_trainer(
    trainer_class: type[SelfDistillationTrainer],
    script_args: DataArguments,
    training_args: Any,
    model_args: ModelConfig,
) -> SelfDistillationTrainer:
    """Build a trainer from parsed arguments, with LoRA and quantization as the model arguments say."""
    return trainer_class(**_trainer_arguments(script_args, training_args, model_args))


def make_baseline(name: str, script_args: DataArguments, training_args: Any, model_args: ModelConfig) -> Any:
    """Build a trainer of `BASELINES` on the same rows and prompts."""
    arguments = _trainer_arguments(script_args, training_args, model_args)
    trainer = BASELINES[name][0](**baseline_arguments(name, arguments))
    prepare_quantized(trainer.model)  # as the methods' trainers do
    warning = warn_of_first_golds(arguments["train_dataset"], training_args.verifier) if name == "grpo" else None
    if warning is not None and trainer.is_world_process_zero():
        warnings.warn(warning, stacklevel=2)
    return trainer


def _trainer_arguments(script_args: DataArguments, training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluate = training_args.eval_strategy != "no"
    rows = load_rows(script_args, script_args.dataset_train_split)
    check_fills_a_batch(training_args, rows)  # before a model is loaded
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": rows,
        "eval_dataset": load_rows(script_args, script_args.dataset_test_split) if evaluate else None,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def train(trainer: SelfDistillationTrainer, dataset_name: str | None = None) -> None:
    """Train, save, push if asked, and leave no process group behind (a launcher would report a failure)."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    check_trained(trainer.state)  # a baseline's trainer does not ask
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()  # the log, for `trl-opsd plot`
    if dataset_name is not None and Path(dataset_name).exists():
        dataset_name = None  # a card links to the Hub, where a local file is not
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).name, dataset_name=dataset_name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    finish(trainer)


def finish(trainer: SelfDistillationTrainer) -> None:
    """Leave a distributed run cleanly; the last thing a script does with its trainer.

    A rank that exits while others still talk to it, or with a process group that something still holds, can abort, and
    the launcher then reports a finished run as failed.
    """
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model  # DistributedDataParallel holds the group
    accelerator.free_memory()
    accelerator.end_training()


def argument_types(name: str) -> tuple[type, type, type]:
    """The dataclasses that hold the settings of a method or a baseline."""
    if name in BASELINES:
        return DataArguments, BASELINES[name][1], ModelConfig
    return DataArguments, TRAINERS[name].config_class, ModelConfig


def make_parser(name: str) -> TrlParser:
    """The parser of a method or a baseline; names must be whole."""
    return _strict_parser(argument_types(name), name)


class _StrictParser(TrlParser):
    error = CommandParser.error


def _strict_parser(types: Sequence[type], name: str) -> TrlParser:
    return _StrictParser(types, prog=f"trl-opsd {name}", allow_abbrev=False)


def parse(name: str, arguments: Sequence[str]) -> tuple[DataArguments, Any, ModelConfig]:
    """Parse command-line arguments, with defaults from the YAML file of `--config`.

    Args:
        name: a method of `TRAINERS` or one of `BASELINES`.
        arguments: words of the command line; options of the launcher are passed over, they are not the trainer's.

    Raises:
        UsageError: a word or a key of the file that is not known; names the nearest.
        ValueError: a value outside its range.
    """
    return parse_as(argument_types(name), name, arguments)


def parse_as(types: Sequence[type], name: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command's words and the recipe of `--config` into dataclasses; raises as `parse` does."""
    line = read_command_line(arguments, types)
    environment = environment_of(line.own)  # TRL's parser sets it
    if environment is not None and os.environ.get("RANK", "0") == "0":
        print(environment, file=sys.stderr)
    recipe = option_value(line.own, "config")
    if recipe is not None:
        check_recipe_values(recipe, types)
    if line.unread and os.environ.get("RANK", "0") == "0":
        print(f"{recipe}: {name} does not read {', '.join(line.unread)}, and leaves them to the methods that do.")
    try:
        # What the parser leaves over are the launcher's keys of the recipe and those of other methods.
        *parsed, _ = _strict_parser(types, name).parse_args_and_config(args=line.own, return_remaining_strings=True)
    except UsageError:
        raise
    except ValueError as error:  # of TRL's and transformers' configs too: nothing but the user's settings was read
        raise ValueError(str(error)) from error
    return tuple(parsed)


def parse_as_one_of(
    processes: int, name: str, arguments: Sequence[str], *neutral: str
) -> tuple[DataArguments, Any, ModelConfig]:
    """Parse what each of several processes would, in this one, where TRL would count a single one's rollouts.

    Args:
        processes: that the run has.
        name: a method of `TRAINERS`.
        arguments: as in `parse`.
        *neutral: words that win over them.
    """
    scaled = ("gradient_accumulation_steps", "steps_per_generation")
    words = []
    for field in scaled:
        value = given_value(arguments, field) or TRAINERS[name].config_class.__dataclass_fields__[field].default
        if value is not None:
            words.append(f"--{field}={int(value) * processes}")
    script_args, args, model_args = parse(name, [*arguments, *neutral, *words])
    for field in scaled:
        setattr(args, field, getattr(args, field) // processes)
    return script_args, args, model_args


def main(name: str, arguments: Sequence[str]) -> Any:
    """Train by a method's or a baseline's name as the command line does; returns the trainer."""
    script_args, training_args, model_args = parse(name, arguments)
    check_writable(training_args.output_dir)
    if name in BASELINES:
        trainer = make_baseline(name, script_args, training_args, model_args)
    else:
        trainer = make_trainer(TRAINERS[name], script_args, training_args, model_args)
    show_steps(trainer, script_args.rollout_table_steps)
    trainer.add_callback(LogFile)
    train(trainer, script_args.dataset_name)
    return trainer


def run(name: str, arguments: Sequence[str]) -> int:
    """Train as one of several launched processes; returns the exit code."""
    calm_libraries()
    return run_for_user(name, arguments, lambda: main(name, arguments))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
