# SPDX-License-Identifier: Apache-2.0
"""The method's section of a model card: what the teacher read, in which thinking mode, and every setting."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .methods import Method

_SETTINGS = (
    "divergence",
    "jsd_weight",
    "clip",
    "clip_value",
    "loss_temperature",
    "loss_reduction",
    "distillation_length",
    "num_loss_tokens_to_skip",
    "reward_weight",
    "teacher_model_kind",
    "teacher_update_rate",
    "teacher_sync_steps",
    "num_generations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "learning_rate",
    "max_grad_norm",
    "max_steps",
    "seed",
)


def thinking_modes(args: Any) -> dict[str, Any]:
    """`enable_thinking` of the student's and the teacher's prompt, None where the template decides."""
    return {
        "student": (args.chat_template_kwargs or {}).get("enable_thinking"),
        "teacher": (args.teacher_chat_template_kwargs or {}).get("enable_thinking"),
    }


def describe_run(args: Any, method: Method) -> str:
    """One line that a run starts with: whose weights teach, and the thinking modes people mix up."""
    clip = f"clip {args.clip} {args.clip_value}" if args.clip else "no clip"
    return (
        f"{method.name}: teacher {args.teacher_model_kind}, {args.divergence}, {clip}, temperature "
        f"{args.loss_temperature}; thinking {json.dumps(thinking_modes(args))}, evaluate with the student's."
    )


def method_section(args: Any, method: Method) -> str:
    """Markdown of the section for a trainer's settings."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    rows = "\n".join(f"| `{name}` | {getattr(args, name)} |" for name in _SETTINGS)
    return f"""
## Method: {method.name}

The model was distilled from itself on its own rollouts ([arXiv {method.paper["id"]}](https://arxiv.org/abs/{method.paper["id"]})) with [trl_opsd](https://pypi.org/project/trl-opsd/). Evaluate it with the student's chat-template arguments, or say which others were used.

| setting | value |
|---|---|
{rows}

Thinking: {json.dumps(thinking_modes(args))}. Student's chat-template arguments: `{json.dumps(args.chat_template_kwargs)}`; teacher's: `{json.dumps(args.teacher_chat_template_kwargs)}`.

The student's last user message, {"as in the dataset" if args.prompt_template is None else "from this template"}:

```text
{args.prompt_template or "{prompt}"}
```

The teacher's:

```text
{args.teacher_prompt_template}
```

Packages: {packages}.
"""


def append_method_section(args: Any, method: Method) -> None:
    """Append the section to the README.md that TRL wrote into the output directory."""
    path = Path(args.output_dir) / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + method_section(args, method), encoding="utf-8")
