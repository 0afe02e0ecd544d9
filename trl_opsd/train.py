# SPDX-License-Identifier: Apache-2.0
"""From arguments to a saved model: what the command line, the demo and the example script share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from .trainers.base import SelfDistillationTrainer
from .trainers.ogls_sd import OGLSSDTrainer
from .trainers.opsd import OPSDTrainer
from .trainers.purified_opsd import PurifiedOPSDTrainer

TRAINERS: dict[str, type[SelfDistillationTrainer]] = {
    "opsd": OPSDTrainer,
    "ogls-sd": OGLSSDTrainer,
    "purified-opsd": PurifiedOPSDTrainer,
}

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments, with a name that may be a local file, and the columns to read."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder, or local .json, .jsonl, .parquet or .csv file of the dataset."},
    )
    problem_column: str | None = field(
        default=None,
        metadata={"help": "Text column to make a user message of. None: the dataset has a `prompt` column."},
    )
    solution_column: str = field(
        default="solution", metadata={"help": "Column of the reference solution, read by the teacher."}
    )


def load_rows(script_args: DataArguments, split: str) -> Dataset | IterableDataset:
    """Load a split with the columns `prompt` and `solution`.

    Args:
        script_args: what to load.
        split: of the dataset; a local file is one split whatever its name.

    Raises:
        ValueError: no dataset was named, or a named column is missing.
    """
    if not script_args.dataset_name:
        raise ValueError("dataset_name is not set. Give a Hub id, a folder, or a local JSON, JSONL or Parquet file.")
    loader = _LOADERS.get(Path(script_args.dataset_name).suffix)
    if loader is None:
        rows = load_dataset(
            script_args.dataset_name,
            name=script_args.dataset_config,
            split=split,
            streaming=script_args.dataset_streaming,
        )
    else:
        rows = load_dataset(
            loader, data_files=script_args.dataset_name, split="train", streaming=script_args.dataset_streaming
        )
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
        rows = rows.rename_column(script_args.solution_column, "solution")
    return rows


def make_trainer(
    trainer_class: type[SelfDistillationTrainer],
    script_args: DataArguments,
    training_args: Any,
    model_args: ModelConfig,
) -> SelfDistillationTrainer:
    """Build a trainer from parsed arguments, with LoRA and quantization as the model arguments say."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluate = training_args.eval_strategy != "no"
    return trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_rows(script_args, script_args.dataset_train_split),
        eval_dataset=load_rows(script_args, script_args.dataset_test_split) if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def train(trainer: SelfDistillationTrainer, dataset_name: str | None = None) -> None:
    """Train, save, push if asked, and leave no process group behind (a launcher would report a failure)."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
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


def parse(method: str, arguments: list[str]) -> tuple[DataArguments, Any, ModelConfig]:
    """Parse command-line arguments, with defaults from the YAML file of `--config`, for a method of `TRAINERS`."""
    parser = TrlParser((DataArguments, TRAINERS[method].config_class, ModelConfig), prog=f"trl-opsd {method}")
    return parser.parse_args_and_config(args=arguments)


def main(method: str, arguments: list[str]) -> SelfDistillationTrainer:
    """Train by a method's name as the command line does; returns the trainer."""
    script_args, training_args, model_args = parse(method, arguments)
    trainer = make_trainer(TRAINERS[method], script_args, training_args, model_args)
    train(trainer, script_args.dataset_name)
    return trainer
