# SPDX-License-Identifier: Apache-2.0
"""The sections of a card, each a text from a trainer or its config."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from ..methods import Method
from ..methods.privileged import PrivilegedText
from .facts import describe_hardware, installed_versions, thinking_modes
from .markdown import as_json, cell, code_span, escaped, fenced, hub_link, keyword_arguments, table
from .plots import has_curves, plot_run
from .results import evaluation_thinking

CURVES = "run.png"

# What of TRL's and HF Trainer's settings makes the run, beside every field that a config of this package sets.
_INHERITED_SETTINGS = (
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "num_iterations",
    "steps_per_generation",
    "min_p",
    "repetition_penalty",
    "reward_weights",
    "use_vllm",
    "seed",
    "data_seed",
)
_SHOWN_APART = {"prompt_template", "teacher_prompt_template", "reference_prompt_template", "hub_token"}


def introduction(trainer: Any, name: str, base: str) -> str:
    """Title, and what was made of what."""
    paper, step, steps = trainer.method.paper, trainer.state.global_step, trainer.state.max_steps
    cited = f" ([{paper['title']}](https://arxiv.org/abs/{paper['id']}))" if paper else ""
    progress = f"{step} of {steps}" if steps > step else f"{step}"
    return f"""# {escaped(name)}

Base: {base}. It was distilled from itself on its own rollouts by {trainer.method.name}{cited} with [trl_opsd](https://pypi.org/project/trl-opsd/): the teacher is the same model, which also reads privileged text. Optimizer steps: {progress}."""


def loading(args: Any, hub_id: str | None, is_adapter: bool) -> str:
    """How to load the model, from the Hub or from the card's folder, and ask it something in the student's mode."""
    package, loader = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    imports = f"from {package} import {loader}\nfrom transformers import AutoTokenizer"
    if not is_adapter:
        imports = f"from transformers import {loader}, AutoTokenizer"
    kind = "a LoRA adapter; the base model is loaded with it" if is_adapter else "a whole model"
    place = "" if hub_id else "\n\nStart Python in the folder of this card, or write the folder's path for `.`."
    question = "{prompt}" if args.prompt_template is None else args.prompt_template
    content = "2+3=?" if args.prompt_template is None else question.replace("{prompt}", "2+3=?")
    return f"""## How to load

This is {kind}. The chat-template arguments are those that it was trained with.{place}

```python
{imports}

name = {hub_id or "."!r}
model = {loader}.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": {content!r}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{keyword_arguments(args.chat_template_kwargs or {})})
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def method_section(
    args: Any, method: Method, evaluation: Sequence[Mapping[str, Any]] | None, columns: Collection[str] = ()
) -> str:
    """The pair of templates, what rows bring beside them, and the triple of thinking modes: student, teacher, evaluation."""
    modes = thinking_modes(args) | {"evaluation": evaluation_thinking(evaluation)}
    parts = [
        f"""## Method: {method.name}

The student's and the teacher's last user message stand below; `{{prompt}}` is the problem, `{{solution}}` what only the teacher reads. Thinking (null: the template decides): {as_json(modes)}. Chat-template arguments: student {as_json(args.chat_template_kwargs)}, teacher {as_json(args.teacher_chat_template_kwargs)}.""",
        "Student" + (", as in the dataset:" if args.prompt_template is None else ":"),
        fenced(args.prompt_template or "{prompt}"),
        "Teacher:",
        fenced(args.teacher_template),
    ]
    if method.inferred:
        parts.insert(1, f"The method is experimental. {method.inferred}")
    brought = PrivilegedText(method, args).describe(columns)
    if brought:
        parts.append(f"By row the teacher also reads: {escaped(brought)}.")
    for name, template in method.templates(args).items():
        parts += [f"Teacher, as `{name}`:", fenced(template)]
    return "\n\n".join(parts)


def settings_section(trainer: Any) -> str:
    """Every setting, the adapter and the seeds."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    own = [name for owner in type(args).__mro__ if is_dataclass(owner) for name in _annotations(owner)]
    names = [*dict.fromkeys(own), *_INHERITED_SETTINGS]
    rows = [["setting", "value"], ["---", "---"]]
    rows += [[f"`{name}`", cell(getattr(args, name))] for name in names if hasattr(args, name)]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    text = f"## Settings\n\n{table(rows)}\n\nRollouts per optimizer step: {batch} (processes: {processes})."
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        targets = sorted(adapter.target_modules) if isinstance(adapter.target_modules, set) else adapter.target_modules
        text += f" LoRA: r {getattr(adapter, 'r', None)}, alpha {getattr(adapter, 'lora_alpha', None)}, on {targets}."
    return f"{text}\n\nSeeds: `seed` {args.seed}, `data_seed` {args.data_seed}. One run with one seed; what other seeds give is not shown here."


def _annotations(owner: type) -> list[str]:
    """Fields that a config of this package declares."""
    if owner.__module__.split(".")[0] in ("trl", "transformers"):
        return []
    return [name for name in owner.__annotations__ if name[0] != "_" and name not in _SHOWN_APART]


def training_section(trainer: Any, folder: Path) -> str:
    """Curves, first and last log, hardware and packages."""
    history = trainer.state.log_history
    entries = [entry for entry in history if "divergence" in entry]
    lines = ["## Training"]
    if has_curves(history):
        plot_run(history, folder / CURVES)
        lines.append(f"![Accuracy of the rollouts, divergence and completion length over the steps]({CURVES})")
    else:
        lines.append("No curves: nothing was logged yet, or matplotlib was not installed.")
    if entries:
        shown = ("reward", "divergence", "clipped_share", "entropy_gap", "completions/mean_length")
        rows = [["step", *shown], ["---"] * (1 + len(shown))]
        for entry in (entries[0], entries[-1]) if len(entries) > 1 else entries:
            rows.append([str(entry["step"]), *(_number(entry.get(name)) for name in shown)])
        lines += [table(rows), "`reward` is of sampled rollouts on training problems, no held-out accuracy."]
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    runtime = "not measured" if seconds is None else f"{seconds:.0f} s"
    lines.append(f"Hardware: {describe_hardware(trainer.accelerator)}. Wall clock of training: {runtime}.")
    lines.append(f"Packages: {', '.join(installed_versions())}.")
    return "\n\n".join(lines)


def sources_section(trainer: Any, dataset_name: str | None, base: str, licence: Mapping[str, str]) -> str:
    """Data and licence."""
    rows = trainer.train_dataset
    size = f"{len(rows):,} rows" if hasattr(rows, "__len__") else "streamed rows, not counted"
    columns = ", ".join(map(code_span, rows.column_names or ())) or "not known before they are read"
    name = "Not named: a local or generated dataset"
    if dataset_name is not None:
        name = hub_link(dataset_name, "datasets/")
    stated = (
        ", ".join(map(escaped, licence.values())) or "not stated in a card that could be read; look there before use"
    )
    return f"""## Data

{name}; {size}, columns {columns}. The dataset's licence is its own.

## Licence

This model derives from {base}. Licence of the base: {stated}."""


def limits_section(args: Any, method: Method) -> str:
    """What the numbers do not say."""
    return f"""## Limits

* Trained to {args.max_completion_length} tokens a rollout. Self-distillation can shorten answers and thin out reflection; compare lengths beside accuracy. Long runs are known to collapse.
* {method.name} teaches what the model already says when it reads the solution; it adds no knowledge.
* One run. Independent runs of such methods differ by several points, and a gain within that is none.
* What "Results" does not list was not measured: other tasks and languages, safety, bias."""


def _number(value: float | None) -> str:
    return "not logged" if value is None else f"{value:.4g}"
