# SPDX-License-Identifier: Apache-2.0
"""The model card: what was trained from what, on which data and machine, with every setting, and what was measured.

TRL writes metadata, framework versions and citations; its introduction is replaced, and everything a run knows is added.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from . import sections
from .facts import base_licence, base_name, base_path, describe_run, redact, thinking_modes
from .index import index_results
from .markdown import escaped
from .results import NUMBERS, add_results, results_section

__all__ = ["NUMBERS", "add_results", "describe_run", "redact", "results_section", "thinking_modes", "write_card"]


def write_card(trainer: Any, dataset_name: str | None, evaluation: Sequence[Mapping[str, Any]] | None) -> None:
    """Rewrite the README.md that TRL put into the output directory, and draw the curves beside it.

    Args:
        trainer: a trainer of this package.
        dataset_name: of the Hub, or None.
        evaluation: what `results_section` takes, or None where nothing was measured.
    """
    folder = Path(trainer.args.output_dir)
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    base, licence = base_name(trainer), base_licence(base_path(trainer))
    card.data.pop("licence", None)  # TRL's placeholder
    for name, value in licence.items():
        setattr(card.data, name, value)
    card.data.pipeline_tag = "text-generation"
    is_adapter = hasattr(trainer.model, "peft_config")
    if is_adapter:
        card.data.library_name = "peft"
    name = trainer.hub_model_id or card.data.to_dict().get("model_name") or folder.name
    parts = (
        sections.introduction(trainer, name, base),
        sections.loading(trainer.args, trainer.hub_model_id, is_adapter),
        results_section(evaluation),
        sections.method_section(trainer.args, trainer.method, evaluation, trainer.train_dataset.column_names or ()),
        sections.settings_section(trainer),
        sections.training_section(trainer, folder),
        sections.sources_section(trainer, dataset_name, base, licence),
        sections.limits_section(trainer.args, trainer.method),
        _from_trl(card.text),
    )
    token = trainer.args.hub_token
    card.text = redact(redact("\n\n".join(parts), token), escaped(token or ""))  # it may stand in a table
    (folder / "README.md").write_text(f"{card.content.rstrip()}\n", encoding="utf-8")
    if evaluation:
        index_results(folder / "README.md", evaluation)


def _from_trl(text: str) -> str:
    """TRL's card from its procedure on: trackers, framework versions, citations."""
    _, found, rest = text.rpartition("## Training procedure")  # the last: a model's name may hold these words
    return f"## Training procedure{rest}" if found else text
