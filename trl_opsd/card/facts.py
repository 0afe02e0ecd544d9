# SPDX-License-Identifier: Apache-2.0
"""What a card says of a run that its config does not: thinking modes in words, hardware, packages, the base."""

import json
import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from ..methods import Method
from .markdown import code_span, hub_link

_PACKAGES = ("trl-opsd", "trl", "transformers", "torch", "accelerate", "peft", "deepspeed", "vllm", "datasets")


def thinking_modes(args: Any) -> dict[str, Any]:
    """`enable_thinking` of the student's and the teacher's prompt, None where the template decides."""
    return {
        "student": (args.chat_template_kwargs or {}).get("enable_thinking"),
        "teacher": (args.teacher_chat_template_kwargs or {}).get("enable_thinking"),
    }


def describe_run(args: Any, method: Method) -> str:
    """One line that a run starts with: whose weights teach, and the thinking modes people mix up."""
    clip = f"clip {args.clip} {args.clip_value}" if args.clip else "no clip"
    loss = f"{args.divergence}, {clip}" if method.has_target else "a loss of its own"
    return (
        f"{method.name}: teacher {args.teacher_model_kind}, {loss}, temperature "
        f"{args.loss_temperature}; thinking {json.dumps(thinking_modes(args))}, evaluate with the student's."
    )


def redact(text: str, token: str | None = None) -> str:
    """The text without a token of the Hub."""
    if token:
        text = text.replace(token, "hf_***")
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "hf_***", text)


@cache
def base_licence(name: str) -> dict[str, str]:
    """Fields on the licence in a model's own card; empty where it has none or cannot be read."""
    try:
        data = ModelCard.load(Path(name) / "README.md" if Path(name).is_dir() else name).data.to_dict()
    except Exception:  # whatever is wrong with that card or the line to it, a save must not fail for it
        return {}
    return {key: str(data[key]) for key in ("license", "license_name", "license_link") if data.get(key)}


def base_path(trainer: Any) -> str:
    """What the base was loaded by; empty if it was made in memory."""
    return getattr(trainer.model.config, "_name_or_path", "")


def base_name(trainer: Any) -> str:
    """The base as a reader can find it: its name on the Hub, or that it was a folder."""
    path = base_path(trainer)
    if not path:
        return "a model that was made in memory"
    if Path(path).is_dir():
        return f"a local model (folder {code_span(Path(path).name)})"
    return hub_link(path)


def describe_hardware(accelerator: Any) -> str:
    """Device, number of processes and engine of a run."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({platform.processor() or platform.machine()})"
    engine = accelerator.distributed_type.value
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        engine += f" ZeRO-{plugin.zero_stage}"
    engine = "no distributed engine" if engine == "NO" else engine
    return f"{accelerator.num_processes} x {name}, {engine}, mixed precision {accelerator.mixed_precision}"


def installed_versions() -> list[str]:
    """Names and versions of what the run stands on, and Python's."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return [*versions, f"Python {platform.python_version()}"]
