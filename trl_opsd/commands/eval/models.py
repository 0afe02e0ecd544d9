# SPDX-License-Identifier: Apache-2.0
"""Which weights a word of `trl-opsd eval --models` stands for; the rule is chosen before anything is measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UsageError

RULES = ("last", "all")
GIVEN, LAST, ON_THE_WAY = "as given", "last", "on the way"


class EvaluatedModel(NamedTuple):
    """A model to measure: what the user named, the folder or Hub id that is read, and its place in its run."""

    given: str
    path: str
    place: str


def resolve_models(names: Sequence[str], rule: str = "last") -> list[EvaluatedModel]:
    """The models that words stand for.

    Args:
        names: Hub ids and folders. A folder with `checkpoint-*` is a run.
        rule: "last": a run is the model that it saved at its end, or else its newest complete checkpoint. "all": its
            earlier complete checkpoints too, as a course. The first name, the base, is always one model.

    Raises:
        UsageError: a run has no complete checkpoint and no model.
    """
    from ...checkpoints.manifest import complete_steps  # with torch, which `--help` does not need

    models = []
    for index, name in enumerate(names):
        steps = complete_steps(name) if Path(name).is_dir() else {}
        if not steps:
            models.append(EvaluatedModel(name, name, GIVEN))
            continue
        whole = [str(Path(name) / f"checkpoint-{step}") for step in sorted(steps) if steps[step] != "half-written"]
        if len(whole) < len(steps):
            print(f"{name}: {len(steps) - len(whole)} half-written checkpoints are passed over")
        if any((Path(name) / file).exists() for file in ("config.json", "adapter_config.json")):
            whole.append(name)
        if not whole:
            raise UsageError(f"--models {name}: no complete checkpoint, and no model beside the half-written ones.")
        *earlier, last = whole
        if rule == "all" and index > 0:
            models += [EvaluatedModel(name, path, ON_THE_WAY) for path in earlier]
        models.append(EvaluatedModel(name, last, LAST))
    return models
