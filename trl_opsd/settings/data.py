# SPDX-License-Identifier: Apache-2.0
"""Settings of the commands that are no trainer's: what data is read, what a terminal shows, and what is inspected."""

from dataclasses import dataclass

from .fields import option


@dataclass
class DataSettings:
    """Where the rows come from, which columns are read, and how often the terminal shows what became of some."""

    dataset_name: str | None = option(
        None,
        "Hub id, folder, or local .json, .jsonl, .parquet or .csv file of the dataset; `champ` is that of the installed "
        "package champ-dataset.",
    )
    dataset_format: str | None = option(
        None,
        "How its rows become `prompt` and `solution`: `problem`, `messages`, `gsm8k`, `openthoughts`, `dapo` or `champ` (of "
        "which `hints` and `concepts` are kept too). None: by the two columns below.",
    )
    problem_column: str | None = option(
        None, "Text column to make a user message of. None: the dataset has a `prompt` column."
    )
    solution_column: str = option("solution", "Column of the reference solution, read by the teacher.")
    rollout_table_steps: int | None = option(
        None,
        "Optimizer steps between two tables of a few rollouts in the terminal; num_completions_to_print says of how many. "
        "None: a tenth of the run. 0: no table.",
    )


@dataclass
class InspectionSettings:
    """What to inspect, beside the data, the models and the method's settings."""

    method: str = option("opsd", "Whose contexts and target are shown, by the name of its training command.")
    student_model_name_or_path: str | None = option(
        None, "Checkpoint of the student. None: the base model, which teaches, itself."
    )
    completions: str | None = option(
        None,
        "A run's saved completions instead of fresh rollouts: JSONL, Parquet, or a run's folder (trained with "
        "log_completions).",
    )
    schedule_step: int | None = option(
        None,
        "Optimizer step at which what follows a schedule is shown. None: the step of the student's checkpoint, or the last "
        "of the run.",
    )
    num_rollouts: int = option(4, "Rollouts on the page.")
    output: str = option("inspect.html", "The page.")
