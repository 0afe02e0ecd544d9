# SPDX-License-Identifier: Apache-2.0
"""The help of the commands that take training settings, made of the dataclasses that declare them, without torch."""

import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from importlib import import_module

from ..pages import PAGES, settings_of
from ..settings.data import DataSettings, InspectionSettings
from ..settings.opsd import OPSDSettings
from ..settings.shared import AnswerSettings, StudentPrompt

_BASELINES = {"sft": (StudentPrompt,), "grpo": (AnswerSettings, StudentPrompt)}
_WIDTH = 110
_LONGEST_DEFAULT = 48

_HEAD = """usage: trl-opsd {command} --config RECIPE.yaml [--accelerate_config zero3] [--SETTING VALUE ...]

{what} Settings are read from the recipe; what is given here wins.

launch:
  --config FILE         recipe, one `key: value` a line; `env:` sets environment variables. Of several, later ones win
  --accelerate_config NAME
                        start under `accelerate launch` with a file or a name: single, ddp, zero2, zero3, fsdp2, ...
  --num_processes N     and every other option of `accelerate launch`; without any, training runs in this process
  --help_all            every setting, those of trl.{trl_config} and trl.ModelConfig too (takes some seconds)
"""

_INSPECT_HEAD = """usage: trl-opsd inspect --config RECIPE.yaml [--method METHOD] [--completions RUN] [--SETTING VALUE ...]

Write an HTML page of what student, target and teacher say of each token of some rollouts. Model, data and settings are those of
the training command: give its recipe, or single settings.
"""

_MODEL = """model:
  --model_name_or_path NAME
                        Hub id or folder
  --use_peft            LoRA, with --lora_r, --lora_alpha, --lora_target_modules, ...
"""


def training_help(command: str) -> str:
    """Help of a training command: launcher, model, data and the settings of this package with their defaults."""
    is_baseline = command in ("sft", "grpo")
    what = (
        f"TRL's {command.upper()} on the same data, as a baseline." if is_baseline else "On-policy self-distillation."
    )
    trl_config = {"sft": "SFTConfig"}.get(command, "GRPOConfig")
    return "\n".join([_HEAD.format(command=command, what=what, trl_config=trl_config), *_training_parts(command)])


def command_help(command: str, words: Sequence[str]) -> str:
    """Help of `inspect`, `dry-run` or `plan`: its own options, and the training settings that it takes.

    Args:
        command: one of them.
        words: behind its name; the settings are those of the method named there, or of `opsd`.
    """
    named = [word.rpartition("=")[2] for word in words]
    method = next((word for word in named if word in PAGES or word in _BASELINES), "opsd")
    parts = _training_parts(method)
    if command == "inspect":
        parts = [_INSPECT_HEAD, _section("inspect", InspectionSettings), *parts]
    else:
        place = {"dry-run": ".dry_run.options", "plan": ".plan_options"}[command]
        parts = [import_module(place, __package__).make_parser().format_help(), *parts]
    more = f"`trl-opsd {method} --help_all` lists the settings of TRL, which are taken too. A recipe of `--config` holds any."
    return "\n".join([*parts, more])


def _training_parts(command: str) -> list[str]:
    """Model, data and settings of a training command; a setting stands once."""
    seen: set[str] = set()
    parts = [_MODEL]
    for title, kind in (("data", DataSettings), *(("settings", kind) for kind in settings_classes(command))):
        parts.append(_section(title, kind, seen))
        seen |= {each.name for each in own_fields(kind)}
    return parts


def settings_classes(command: str) -> list[type]:
    """The dataclasses with the settings of a training command, its own first."""
    kinds = _BASELINES.get(command) or (*settings_of(command).__mro__, *OPSDSettings.__mro__)
    return [kind for kind in dict.fromkeys(kinds) if kind is not object]


def own_settings() -> set[str]:
    """Names of this package's settings of all methods and baselines, and of their data."""
    kinds = {DataSettings, *(kind for command in (*PAGES, *_BASELINES) for kind in settings_classes(command))}
    return {each.name for kind in kinds for each in fields(kind)}


def own_fields(kind: type) -> Iterator[Field]:
    """The fields that a dataclass declares itself."""
    return (each for each in fields(kind) if each.name in vars(kind).get("__annotations__", {}))


def _section(title: str, kind: type, seen: Collection[str] = ()) -> str:
    entries = [_entry(each) for each in own_fields(kind) if each.name not in seen]
    return f"{title} ({kind.__name__}):\n" + "\n".join(entries) + "\n"


def _entry(setting: Field) -> str:
    indent = " " * 24
    text = f"{setting.metadata['help']} (default: {_shown(setting)})"
    body = textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    head = f"  --{setting.name}"
    return head.ljust(24) + body.lstrip() if len(head) < 23 else f"{head}\n{body}"


def _shown(setting: Field) -> str:
    """A field's default as one would write it; a long text shortened."""
    default = setting.default if setting.default is not MISSING else setting.default_factory()
    return (
        textwrap.shorten(repr(default), _LONGEST_DEFAULT, placeholder=" ...'")
        if isinstance(default, str)
        else repr(default)
    )
