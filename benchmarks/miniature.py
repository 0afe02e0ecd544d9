# SPDX-License-Identifier: Apache-2.0
"""What the papers claim, in miniature: every method, ablation and baseline on the embedded model at one rollout budget.

    python benchmarks/miniature.py --output_dir outputs/miniature [--workers 2]   # train, measure, table and picture
    python benchmarks/miniature.py --family --steps 20      # every method of `pages.PAGES`, and baselines
    python benchmarks/miniature.py --split validation --only OGLS-SD --seeds 0 --set steering_strength=1   # to choose a setting

A run sees 3,840 sequences (60 steps of 64): rollouts, or references for SFT. What is measured is the last model of each
run, on problems that no choice has seen. Runs already in the folder are not repeated.
"""

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STEPS, ROLLOUTS, TRAINING_PROBLEMS = 60, 64, 8192
SETTINGS = {
    "per_device_train_batch_size": ROLLOUTS,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "learning_rate": 1e-4,
    "warmup_steps": 5,
    "lr_scheduler_type": "constant_with_warmup",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 5,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_completion_length": 96,
    "chat_template_kwargs": {"enable_thinking": False},
}
# Without the papers' clip, which makes this model worse (docs/log.md).
TEACHER = {"teacher_chat_template_kwargs": {"enable_thinking": False}, "clip": None}
GROUPS = {"num_generations": 8}
# Reverse KL is what the paper writes; on validation problems it gained more than twice what forward KL did.
STEERING = {
    **TEACHER,
    **GROUPS,
    "divergence": "reverse_kl",
    "distillation_length": 96,
    "steering_warmup_steps": 10,
}


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        kind: which trainer.
        settings: beside the common ones.
        shuffled: problems get each other's solutions.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False


RUNS = {
    "OPSD": Run("opsd", TEACHER),
    "OPSD, paper's clip": Run("opsd", {**TEACHER, "clip": "upper"}),
    "OPSD, shuffled solutions": Run("opsd", TEACHER, shuffled=True),
    "OGLS-SD": Run("ogls-sd", STEERING),
    "OGLS-SD, forward KL": Run("ogls-sd", {**STEERING, "divergence": "forward_kl"}),
    "OGLS-SD, mean of positives": Run("ogls-sd", {**STEERING, "steering_teacher": "mean_of_positives"}),
    "OGLS-SD, positive only": Run("ogls-sd", {**STEERING, "steering_teacher": "positive_only"}),
    "Purified OPSD": Run("purified-opsd", TEACHER),
    "Purified OPSD, nothing subtracted": Run("purified-without-reference", TEACHER),
    "Purified OPSD, no bound": Run("purified-opsd", {**TEACHER, "tanh_bound": 1e4}),
    # The baselines at the better of two rates on validation problems, 1e-4 and 3e-4.
    "GRPO": Run("grpo", {**GROUPS, "learning_rate": 3e-4}),
    "SFT on references": Run("sft", {"learning_rate": 3e-4}),
}


# What a method of the family needs beside the common settings; its own prompts are the demo's, see `family_settings`.
OWN = {
    "mopd": {"max_teacher_prompt_length": 400},  # of 512 positions: it shows up to three rollouts
    "popd": {"distillation_length": "8..40 in 10"},
    # It writes arithmetic, whatever it is asked.
    "resd": {"write_review": False, "write_playbook": False, "max_teacher_prompt_length": 400},
    "trace": {"annotator_function": "miniature:last_result"},
}
BESIDE_THE_FAMILY = ("OPSD", "GRPO", "SFT on references")


def family() -> dict[str, Run]:
    """A run of every method of the table that has no rows of its own above, by its name in Python."""
    from trl_opsd.pages import PAGES

    known = {run.kind for run in RUNS.values()}
    return {page.prefix: Run(name, family_settings(name)) for name, page in PAGES.items() if name not in known}


def family_settings(name: str) -> dict[str, Any]:
    """Settings of a method: the demo's for the teacher, groups where its default has some, and prompts that the model knows."""
    from trl_opsd.pages import settings_of

    own = {option.name: option.default for option in fields(settings_of(name))}
    prompts = {key: demo_prompt(text) for key, text in own.items() if key.endswith("_prompt_template")}
    groups = GROUPS if (own.get("num_generations") or 1) > 1 else {}
    return {**TEACHER, **groups, **prompts, **OWN.get(name, {})}


def demo_prompt(template: str) -> str:
    """A template with the same slots in the form of the demo's, which is all that the model has learnt to read."""
    slots = list(dict.fromkeys(re.findall(r"\{([a-z_]+)\}", template)))
    others = sorted((slot for slot in slots if slot != "prompt"), key=lambda slot: slot != "solution")
    shown = "\n".join(f"{{{slot}}}" for slot in others)
    return f"{{prompt}}\n[reference]\n{shown}\n[end]" if "prompt" in slots else f"[reference]\n{shown}\n[end]"


def with_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what methods read beside prompt and solution, all of it from the row itself."""
    *steps, answer = row["solution"].split("\n")
    return {
        **row,
        "plan": "\n".join(step.split("=")[0] for step in steps),
        "skills": [steps[0], steps[-1]] if steps else [],
        "rubric": steps,
        "feedback": answer,
        "critique": row["solution"],
        "translation": row["prompt"][-1]["content"],
    }


def last_result(rollout: Any) -> list[tuple[int, int, str, str]]:
    """TRACE's annotator: the result of the last step of a rollout, a key span in a right one and an error span in a wrong one."""
    found = list(re.finditer(r"=(\d+)", rollout.completion))
    kind = "K" if (rollout.reward or 0.0) >= 0.5 else "E"
    return [(*found[-1].span(1), kind, "9")] if found else []


def make_trainer(run: Run, folder: Path, seed: int, overrides: dict[str, Any], *, model: str | None = None, rows=None):
    """The trainer of one run.

    Args:
        run: whose it is.
        folder: of its model.
        seed: of the run.
        overrides: of its settings.
        model: folder of the base; None for the embedded one.
        rows: of training; None for the embedded task's.
    """
    from datasets import Dataset
    from transformers import set_seed

    from trl_opsd.demo import build_rows, model_path

    set_seed(seed)
    rows = [with_columns(row) for row in rows or build_rows("train", TRAINING_PROBLEMS)]
    if run.shuffled:
        solutions = [row["solution"] for row in rows]
        random.Random(f"shuffled/{seed}").shuffle(solutions)
        rows = [{**row, "solution": solution} for row, solution in zip(rows, solutions, strict=True)]
    settings = {**SETTINGS, **run.settings, **overrides, "output_dir": str(folder), "seed": seed}
    make = _sft_trainer if run.kind == "sft" else partial(_rollout_trainer, run.kind)
    return make(settings, Dataset.from_list(rows), model or model_path())


def train(run: Run, folder: Path, seed: int, overrides: dict[str, Any]) -> None:
    """Train and save one run."""
    trainer, start = make_trainer(run, folder, seed, overrides), time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    settings = {**SETTINGS, **run.settings, **overrides}
    cost = {"seconds": seconds, "sampled": sampled_tokens(trainer.state.log_history, settings)}
    (folder / "cost.json").write_text(json.dumps(cost))


def sampled_tokens(log: list[dict[str, Any]], settings: dict[str, Any]) -> float:
    """Tokens of all rollouts of a run, and of what the model wrote before scoring, from the means of each logging interval."""
    total, before = 0.0, 0
    for entry in log:
        if "completions/mean_length" in entry:
            batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
            a_step = batch * entry["completions/mean_length"] + entry.get("written/tokens", 0.0)
            total, before = total + (entry["step"] - before) * a_step, entry["step"]
    return total


def _rollout_trainer(kind: str, settings: dict[str, Any], dataset, model: str):
    from trl import GRPOConfig, GRPOTrainer

    from trl_opsd.commands.train import TRAINERS
    from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE
    from trl_opsd.rewards import accuracy_reward

    settings = {**SAMPLING, **settings}
    if kind == "grpo":
        return GRPOTrainer(
            model=model, reward_funcs=accuracy_reward, args=GRPOConfig(**settings), train_dataset=dataset
        )
    trainer_class = _without_reference() if kind == "purified-without-reference" else TRAINERS[kind]
    settings["teacher_prompt_template"] = TEACHER_PROMPT_TEMPLATE
    if kind.startswith("purified"):
        settings["reference_prompt_template"] = REFERENCE_ONLY_TEMPLATE
    return trainer_class(model=model, args=trainer_class.config_class(**settings), train_dataset=dataset)


def _without_reference():
    """Purified OPSD's trainer with the plain view subtracted where the paper subtracts the reference-only one."""
    from dataclasses import replace

    from trl_opsd import PurifiedOPSDTrainer
    from trl_opsd.teacher.contexts import TeacherContext

    def contexts(group, settings, moment):
        plain = TeacherContext("plain", None, anchor=1.0, direction=-1.0)
        return [(plain, TeacherContext("teacher", rollout.solution, direction=1.0)) for rollout in group]

    class WithoutReferenceTrainer(PurifiedOPSDTrainer):
        method = replace(PurifiedOPSDTrainer.method, name="Purified OPSD without reference", contexts=contexts)

    return WithoutReferenceTrainer


def _sft_trainer(settings: dict[str, Any], dataset, model: str):
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def to_text(row):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True, **SAMPLING["chat_template_kwargs"]
        )
        return {"prompt": prompt, "completion": row["solution"]}

    beside = [name for name in dataset.column_names if name != "prompt"]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=dataset.map(to_text, remove_columns=beside),
        processing_class=tokenizer,
    )


# Measuring

MEASURED = {"num_samples": 16, "temperature": 1.0, "max_new_tokens": 96, "batch_size": 512}
DECOMPOSED_PROBLEMS = 100


def measure(path: str, rows: list[dict], seed: int) -> dict[str, Any]:
    """Accuracy, length, markers and decomposition of a saved model on rows of problems, sampled with `seed`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_opsd.evaluation.measures import evaluate

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    result = evaluate(
        model, tokenizer, rows, chat_template_kwargs=SAMPLING["chat_template_kwargs"], seed=1234 + seed, **MEASURED
    )
    return {
        "scores": list(result.per_question_scores),
        "avg": result.avg_at_k,
        "pass": result.pass_at_k,
        "length": result.mean_completion_length,
        "cut": result.cut_share,
        "markers": result.markers_per_1000_tokens,
        "decomposition": decompose(model, tokenizer, rows, result.completions),
    }


def decompose(model, tokenizer, rows: list[dict], completions) -> dict[str, float]:
    """Mean over tokens of the trained model's own rollouts; teacher views are the base model's."""
    import torch
    from transformers import AutoModelForCausalLM

    from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE, model_path
    from trl_opsd.evaluation.sampling import render_prompt
    from trl_opsd.losses import SignalDecomposition, decompose_signal

    base = AutoModelForCausalLM.from_pretrained(model_path())
    sums, count = torch.zeros(len(SignalDecomposition._fields), dtype=torch.float64), 0
    for row, (completion, *_) in list(zip(rows, completions, strict=True))[:DECOMPOSED_PROBLEMS]:
        ids = tokenizer(completion.text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

        def logits(reader, template, ids=ids, row=row):
            text = template.format(prompt=row["prompt"][0]["content"], solution=row["solution"])
            prompt = render_prompt(tokenizer, [{"role": "user", "content": text}], SAMPLING["chat_template_kwargs"])
            with torch.no_grad():
                return reader(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]

        views = logits(model, "{prompt}"), logits(base, TEACHER_PROMPT_TEMPLATE), logits(base, REFERENCE_ONLY_TEMPLATE)
        sums += torch.stack([values.double().sum() for values in decompose_signal(*views)])
        count += len(ids)
    return dict(zip(SignalDecomposition._fields, (sums / count).tolist(), strict=True))


def run_one(name: str | None, seed: int, output: Path, split: str, num_problems: int, overrides: dict) -> Path:
    """Train (nothing for the base model, name None), measure, and write the result; one done before is kept."""
    from trl_opsd.demo import build_rows, model_path

    label = "-".join([slug(name or "base"), *(f"{key}_{value}" for key, value in overrides.items()), str(seed)])
    folder = output / label
    result = folder / f"{split}.json"
    if result.exists():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    if name is not None and not (folder / "log.json").exists():
        train({**RUNS, **family()}[name], folder, seed, overrides)
    numbers = measure(model_path() if name is None else str(folder), build_rows(split, num_problems), seed)
    cost = folder / "cost.json"
    numbers |= json.loads(cost.read_text()) if cost.exists() else {}
    result.write_text(json.dumps({"name": name or "base", "seed": seed, **numbers}))
    print(f"{label}: avg@{MEASURED['num_samples']} {numbers['avg']:.3f}, markers {numbers['markers']:.1f}", flush=True)
    return result


def slug(name: str) -> str:
    """A folder name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower().replace("'", ""))


# Reporting

COLUMNS: dict[str, Callable[[dict], str]] = {
    "sampled tokens": lambda numbers: f"{numbers['sampled']:,.0f}" if "sampled" in numbers else "",
    "seconds": lambda numbers: f"{numbers['seconds']:.0f}" if "seconds" in numbers else "",
    "tokens": lambda numbers: f"{numbers['length']:.1f}",
    "markers per 1,000": lambda numbers: f"{numbers['markers']:.1f}",
    "signal left (nats)": lambda numbers: f"{numbers['decomposition']['total_norm']:.1f}",
    "reference part: size, cosine": lambda numbers: (
        f"{numbers['decomposition']['reference_ratio']:.2f}, {numbers['decomposition']['reference_cosine']:+.2f}"
    ),
    "question part: size, cosine": lambda numbers: (
        f"{numbers['decomposition']['question_ratio']:.2f}, {numbers['decomposition']['question_cosine']:+.2f}"
    ),
}


def summarize(results: list[dict]) -> list[dict]:
    """One row a name: means over seeds, gains over the base per seed and with an interval over questions."""
    import numpy as np

    from trl_opsd.evaluation.measures import paired_difference

    base_scores = np.mean([result["scores"] for result in results if result["name"] == "base"], axis=0)
    rows = []
    for name in ["base", *RUNS, *family()]:
        runs = sorted((result for result in results if result["name"] == name), key=lambda result: result["seed"])
        if not runs:
            continue
        scores = np.mean([run["scores"] for run in runs], axis=0)
        mean = {key: float(np.mean([run[key] for run in runs])) for key in ("avg", "pass", "length", "cut", "markers")}
        parts = {key: float(np.mean([run["decomposition"][key] for run in runs])) for key in runs[0]["decomposition"]}
        costs = [key for key in ("sampled", "seconds") if all(key in run for run in runs)]
        mean |= {key: float(np.mean([run[key] for run in runs])) for key in costs}
        gain = paired_difference(scores, base_scores)
        rows.append({"name": name, **mean, "decomposition": parts, "gain": gain, "seeds": [run["avg"] for run in runs]})
    return rows


def table(rows: list[dict]) -> str:
    """The summary in Markdown."""
    head = ["", f"avg@{MEASURED['num_samples']}", "gain over the base, points [95 %]", "seeds", *COLUMNS]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    for row in rows:
        gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in row["gain"]))
        seeds = " ".join(f"{value:.3f}" for value in row["seeds"])
        is_base = row["name"] == "base"
        cells = [row["name"], f"{row['avg']:.3f}", "" if is_base else gain, "" if is_base else seeds]
        lines.append(" | ".join(["", *cells, *(column(row) for column in COLUMNS.values()), ""]).strip())
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Gains with intervals and seeds, and reflection markers beside them."""
    from matplotlib.figure import Figure

    base, *rows = rows
    rows = rows[::-1]
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.6), layout="constrained")
    gains, markers = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for y, row in enumerate(rows):
        estimate, low, high = (100 * value for value in row["gain"])
        color = "#000000" if row["name"] in ("GRPO", "SFT on references") else "#0072B2"
        gains.errorbar(estimate, y, xerr=[[estimate - low], [high - estimate]], fmt="D", color=color, capsize=4, ms=5)
        gains.plot(
            [100 * (seed - base["avg"]) for seed in row["seeds"]],
            [y] * len(row["seeds"]),
            "o",
            ms=4,
            mfc="none",
            color="#D55E00",
        )
        markers.barh(y, row["markers"], color="#009E73", height=0.6)
    gains.axvline(0, color="#000000", lw=0.8)
    gains.set_yticks(range(len(rows)), [row["name"] for row in rows])
    gains.set(
        title=f"Gain in avg@{MEASURED['num_samples']} over the base ({base['avg']:.3f}), points",
        xlabel="diamond: mean and 95 % interval over questions; circles: seeds",
    )
    markers.axvline(base["markers"], color="#000000", lw=0.8, ls="--")
    markers.set(title="Reflection markers per 1,000 tokens", xlabel="dashed: the base")
    for axes in (gains, markers):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is asked for and not done yet, then print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/miniature"))
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--family", action="store_true", help="every other method of the table, with OPSD, GRPO and SFT"
    )
    names = [*RUNS, *family()]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that override a run's")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    overrides = {name: json.loads(value) for name, value in (pair.split("=") for pair in options.set)}
    if options.steps != STEPS:
        overrides = {"max_steps": options.steps, **overrides}
    chosen = options.only or ([*BESIDE_THE_FAMILY, *family()] if options.family else list(RUNS))
    jobs = [(name, seed, overrides if name else {}) for seed in options.seeds for name in (None, *chosen)]
    with ProcessPoolExecutor(options.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [
            pool.submit(run_one, name, seed, options.output_dir, options.split, options.problems, settings)
            for name, seed, settings in jobs
        ]
        results = [json.loads(future.result().read_text()) for future in futures]
    rows = summarize(results)
    print(table(rows))
    plot(rows, options.output_dir / f"{options.split}.png")


if __name__ == "__main__":
    main()
