# SPDX-License-Identifier: Apache-2.0
"""The help of the commands that take training settings, read from the source of the settings: importing them would load torch first."""

import ast
import textwrap
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path

_PROMPT = ("trainers/settings.py", "StudentPrompt")
_OPSD = (("trainers/config.py", "OPSDConfig"), ("trainers/settings.py", "SelfDistillationSettings"), _PROMPT)
_CLASSES = {  # command -> the classes with its settings, and their files
    "opsd": _OPSD,
    "ogls-sd": (("trainers/ogls_sd.py", "OGLSSDConfig"), *_OPSD),
    "purified-opsd": (("trainers/purified_opsd.py", "PurifiedOPSDConfig"), *_OPSD),
    "sft": (_PROMPT,),
    "grpo": (("trainers/baselines.py", "GRPOBaselineConfig"), _PROMPT),
}
_DATA = ("commands/train.py", "DataArguments")
_WIDTH = 110

_HEAD = """usage: trl-opsd {command} --config RECIPE.yaml [--accelerate_config zero3] [--SETTING VALUE ...]

{what} Settings are read from the recipe; what is given here wins.

launch:
  --config FILE         recipe, one `key: value` a line; `env:` sets environment variables
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
    method = next((word for word in named if word in _CLASSES), "opsd")
    parts = _training_parts(method)
    if command == "inspect":
        parts = [_INSPECT_HEAD, _section("inspect", ("inspect/run.py", "InspectArguments")), *parts]
    else:
        place = {"dry-run": ".dry_run.options", "plan": ".plan_options"}[command]
        parts = [import_module(place, __package__).make_parser().format_help(), *parts]
    more = f"`trl-opsd {method} --help_all` lists the settings of TRL, which are taken too. A recipe of `--config` holds any."
    return "\n".join([*parts, more])


def _training_parts(command: str) -> list[str]:
    """Model, data and settings of a training command; a setting stands once."""
    seen: set[str] = set()
    parts = [_MODEL]
    for title, place in (("data", _DATA), *(("settings", place) for place in _CLASSES[command])):
        parts.append(_section(title, place, seen))
        seen |= {name for name, _, _ in settings_of(*place)}
    return parts


def _section(title: str, place: tuple[str, str], seen: Collection[str] = ()) -> str:
    entries = [_entry(*setting) for setting in settings_of(*place) if setting[0] not in seen]
    return f"{title} ({place[1]}):\n" + "\n".join(entries) + "\n"


def own_settings() -> set[str]:
    """Names of this package's settings of all methods and baselines, and of their data."""
    places = {_DATA, *(place for classes in _CLASSES.values() for place in classes)}
    return {name for place in places for name, _, _ in settings_of(*place)}


def settings_of(file: str, class_name: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and help of every field that a class defines by `option(default, help)`."""
    tree = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    for node in found.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.AnnAssign) and isinstance(value, ast.Call) and ast.unparse(value.func) == "option":
            default, text = value.args
            yield node.target.id, ast.unparse(default), ast.literal_eval(text)


def _entry(name: str, default: str, text: str) -> str:
    indent = " " * 24
    body = textwrap.fill(f"{text} (default: {default})", _WIDTH, initial_indent=indent, subsequent_indent=indent)
    head = f"  --{name}"
    return head.ljust(24) + body.lstrip() if len(head) < 23 else f"{head}\n{body}"
