# SPDX-License-Identifier: Apache-2.0
"""A run that hurts although the teacher is right: digit reversal on the embedded model, warmed by SFT to about 35 %.

    python benchmarks/digit_reversal.py --output_dir outputs/digit_reversal [--only NAME ...] [--base few] [--seeds 0 1 2]

`28137` is reversed a digit a line; the embedded model has never seen the task and learns it from right solutions alone,
with and without the reference in the prompt, until it solves about a third of the problems. Each row of the table changes
one thing. Beside accuracy stand the numbers of the first logs and of the last. `accuracy_push.py` says why; docs/log.md has what
came of both.
"""

import argparse
import json
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miniature import GROUPS, SAMPLING, SETTINGS, STEERING, slug

TEST_PROBLEMS, TRAINING_PROBLEMS, SAMPLES, WARM_TO = 150, 4096, 4, 0.35
DIGITS = (4, 5)
WARM_SHARES = {
    "nearly": 0.1,
    "most": 0.2,
    "plain": 1.0,
    "few": 0.9,
    "some": 0.8,
    "third": 0.67,
    "both": 0.5,
    "slips": 0.5,
}
# As in the miniature, but the teacher thinks as the student does.
STEERING = {name: value for name, value in STEERING.items() if name != "teacher_chat_template_kwargs"} | {
    "distillation_length": 48,
    "steering_warmup_steps": 5,
}
WARM_RATE, WARM_CHECK, WARM_LIMIT = 3e-3, 3, 1000
SETTINGS = {**SETTINGS, "max_steps": 25, "logging_steps": 1}


def solution_of(number: str) -> str:
    """One digit a line from the end, each with what is left and what was written; then the boxed answer."""
    lines = [f"{number[: len(number) - k]}:{number[::-1][:k]}" for k in range(1, len(number))]
    return "\n".join([*lines, f"\\boxed{{{number[::-1]}}}"])


def build_rows(split: str, num_rows: int) -> list[dict[str, Any]]:
    """Distinct numbers without zeros, the test's apart from the training's."""
    generator, numbers = random.Random("digit reversal"), {}
    while len(numbers) < TEST_PROBLEMS + num_rows:
        numbers["".join(generator.choices("123456789", k=generator.choice(DIGITS)))] = None
    chosen = list(numbers)[:TEST_PROBLEMS] if split == "test" else list(numbers)[TEST_PROBLEMS:]
    return [
        {"prompt": [{"role": "user", "content": f"reverse {number}=?"}], "solution": solution_of(number)}
        for number in chosen[:num_rows]
    ]


# The base


def warm(kind: str, folder: Path, thinking: bool, accuracy: float = WARM_TO) -> str:
    """Folder of the embedded model trained on right solutions until it solves `accuracy` of them; made once.

    Args:
        kind: "plain" shows no reference, "few" to every tenth example, "some" to a fifth, "third" to a third, "both" to half, "most" to four
            fifths, "nearly" to nine tenths;
            "slips" also shows the reference beside attempts with an error, whose correction is trained on.
        folder: of all bases.
        thinking: whether the prompt leaves the think block to the model.
        accuracy: at temperature 1, in (0, 1).
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_opsd.demo import model_path
    from trl_opsd.demo.build import answer_logits

    path = folder / f"warm-{kind}-{'on' if thinking else 'off'}{'' if accuracy == WARM_TO else f'-{accuracy}'}"
    if (path / "config.json").exists():
        return str(path)
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(model_path()), AutoModelForCausalLM.from_pretrained(model_path())
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    rows, generator = build_rows("train", TRAINING_PROBLEMS + TEST_PROBLEMS), random.Random(f"warm/{kind}")
    for step in range(1, WARM_LIMIT + 1):
        batch = [
            draw_example(row, kind, thinking, generator) for row in generator.choices(rows[:TRAINING_PROBLEMS], k=32)
        ]
        logits, labels = answer_logits(model, [example.user for example in batch], batch, tokenizer)
        loss = cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % WARM_CHECK == 0 and loss.item() < 0.2:
            with torch.no_grad():
                reached = answer_log_probs(model, tokenizer, rows[-TEST_PROBLEMS:], thinking).exp().mean().item()
            print(f"{path.name}: step {step}, loss {loss.item():.3f}, accuracy {reached:.3f}", flush=True)
            if reached >= accuracy:
                break
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def answer_log_probs(model, tokenizer, rows, thinking: bool):
    """Log-probability (rows,) of each solution; the mean of its exponential is what sampling at temperature 1 scores."""
    import torch

    from trl_opsd.demo.build import answer_logits
    from trl_opsd.demo.corpus import Example

    questions = [row["prompt"][0]["content"] for row in rows]
    pairs = zip(questions, rows, strict=True)
    batch = [Example(question, thinking, ((row["solution"], True),), question) for question, row in pairs]
    logits, labels = answer_logits(model, questions, batch, tokenizer)
    log_probs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    lengths = [len(ids_of_solution(tokenizer, row["solution"])) for row in rows]
    return torch.stack([part.sum() for part in log_probs.split(lengths)])


def ids_of_solution(tokenizer, solution: str) -> list[int]:
    """Its tokens, the end included."""
    return tokenizer(solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def draw_example(row: dict[str, Any], kind: str, thinking: bool, generator: random.Random):
    """An example of `trl_opsd.demo.corpus`, with or without the reference."""
    from trl_opsd.demo import TEACHER_PROMPT_TEMPLATE
    from trl_opsd.demo.corpus import Example

    question, solution = row["prompt"][0]["content"], row["solution"]
    pieces = ((solution, True),)
    if generator.random() < WARM_SHARES[kind]:
        return Example(question, thinking, pieces, question)
    if kind == "slips":
        pieces = with_slip(solution, generator)
    return Example(TEACHER_PROMPT_TEMPLATE.format(prompt=question, solution=solution), thinking, pieces, question)


def with_slip(solution: str, generator: random.Random) -> tuple[tuple[str, bool], ...]:
    """The solution with up to two of its digits replaced: read, not trained on; the right text goes on behind them."""
    places = [place for place, letter in enumerate(solution) if letter.isdigit()]
    wrong = set(generator.sample(places, generator.choice((0, 1, 2))))
    return tuple(
        (generator.choice("123456789"), False) if place in wrong else (letter, True)
        for place, letter in enumerate(solution)
    )


def measure(model, tokenizer, rows, chat_template_kwargs, *, seed: int, samples: int = SAMPLES):
    """Accuracy at temperature 1."""
    from trl_opsd.evaluation.measures import evaluate

    settings = {"num_samples": samples, "temperature": 1.0, "max_new_tokens": 48, "batch_size": 300, "seed": seed}
    return evaluate(model, tokenizer, rows, chat_template_kwargs=chat_template_kwargs, **settings)


def place_of_error(ids: list[int], right: list[int]) -> int:
    """Place of the first token that is not the solution's; the length of `ids` where there is none."""
    return next((k for k, (a, b) in enumerate(zip(ids, right, strict=False)) if a != b), len(ids))


# Runs


@dataclass(frozen=True)
class Run:
    """One row of the table: trainer, base and its accuracy, both thinking modes, settings beside the common ones, and the part.

    The base is warmed and measured in the mode `warmed`, by default that in which it trains.
    """

    kind: str = "opsd"
    base: str = "both"
    warm_to: float = WARM_TO
    thinking: bool = True
    warmed: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    part: str = ""

    @property
    def measured(self) -> bool:
        """Thinking mode of the base and of what is measured."""
        return self.thinking if self.warmed is None else self.warmed


RUNS = {
    "OPSD": Run(),
    "OPSD, base without reference": Run(base="plain"),
    "OPSD, base with few references": Run(base="few"),
    "OPSD, up to the first error": Run(base="few", part="before"),
    "OPSD, behind the first error": Run(base="few", part="behind"),
    "OPSD, base that saw slips": Run(base="slips"),
    "OPSD, thinking off in both": Run(thinking=False),
    "OPSD, only teacher thinking": Run(
        thinking=False, settings={"teacher_chat_template_kwargs": {"enable_thinking": True}}
    ),
    "OPSD, trained in the mode that the base has not learnt": Run(thinking=False, warmed=True),
    "Purified OPSD, trained in that mode": Run("purified-opsd", thinking=False, warmed=True),
    "OGLS-SD, trained in that mode": Run("ogls-sd", thinking=False, warmed=True, settings=STEERING),
    "OPSD, rate 1e-3": Run(settings={"learning_rate": 1e-3}),
    "OPSD, rate 1e-5": Run(settings={"learning_rate": 1e-5}),
    "OPSD, reverse KL": Run(settings={"divergence": "reverse_kl"}),
    "OPSD, paper's clip": Run(settings={"clip": "upper"}),
    "OGLS-SD": Run("ogls-sd", settings=STEERING),
    "Purified OPSD": Run("purified-opsd"),
    "GRPO": Run("grpo", settings={**GROUPS, "learning_rate": 1e-4}),
}


def trainer_on(part: str):
    """OPSD's trainer that distils a part of each rollout: "before" its first error (and at it), or "behind" it."""
    from trl_opsd import OPSDTrainer

    class PartTrainer(OPSDTrainer):
        def before_rewards(self, rows, completions, rollout_ids):
            self._solutions, self._ids = [row["solution"] for row in rows], rollout_ids
            super().before_rewards(rows, completions, rollout_ids)

        def _distilled_mask(self, batch, contexts):
            mask = super()._distilled_mask(batch, contexts)
            for row, (ids, solution) in enumerate(zip(self._ids, self._solutions, strict=True)):
                error = place_of_error(ids, ids_of_solution(self.tokenizer, solution))
                mask[row, slice(error + 1, None) if part == "before" else slice(error + 1)] = 0
            return mask

    return PartTrainer


def train(run: Run, base: str, folder: Path, seed: int, overrides: dict[str, Any]) -> list[dict]:
    """Train and save one run; returns its log."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    from trl_opsd.commands.train import TRAINERS
    from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE
    from trl_opsd.rewards import accuracy_reward

    set_seed(seed)
    kwargs = {"enable_thinking": run.thinking}
    common = {
        **SETTINGS,
        **SAMPLING,
        "max_completion_length": 48,
        "chat_template_kwargs": kwargs,
        "output_dir": str(folder),
        "seed": seed,
    }
    dataset = Dataset.from_list(build_rows("train", TRAINING_PROBLEMS))
    if run.kind == "grpo":
        args = GRPOConfig(**{**common, **run.settings, **overrides})
        trainer = GRPOTrainer(model=base, reward_funcs=accuracy_reward, args=args, train_dataset=dataset)
    else:
        teacher = {
            "teacher_chat_template_kwargs": kwargs,
            "clip": None,
            "teacher_prompt_template": TEACHER_PROMPT_TEMPLATE,
        }
        trainer_class = trainer_on(run.part) if run.part else TRAINERS[run.kind]
        if "reference_prompt_template" in trainer_class.config_class.__dataclass_fields__:
            teacher["reference_prompt_template"] = REFERENCE_ONLY_TEMPLATE
        settings = {**common, **teacher, **run.settings, **overrides}
        trainer = trainer_class(model=base, args=trainer_class.config_class(**settings), train_dataset=dataset)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.state.log_history


def run_one(name: str, changes: dict[str, Any], seed: int, output: Path, overrides: dict[str, Any]) -> dict:
    """Train, measure and probe one run, `changes` being fields of `Run`; one done before is read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_opsd.demo import TEACHER_PROMPT_TEMPLATE
    from trl_opsd.evaluation.measures import paired_difference

    run = replace(RUNS[name], **changes)
    label = [slug(name), *(f"{key}_{value}" for key, value in {**changes, **overrides}.items())]
    folder = output / "-".join([*label, str(seed)])
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    base_path = warm(run.base, output, run.measured, run.warm_to)
    log = train(run, base_path, folder, seed, overrides)
    rows, kwargs = build_rows("test", TEST_PROBLEMS), {"enable_thinking": run.measured}
    teacher_kwargs = run.settings.get("teacher_chat_template_kwargs", kwargs)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    model = AutoModelForCausalLM.from_pretrained(base_path)
    before = measure(model, tokenizer, rows, kwargs, seed=1234)
    privileged = [
        {
            **row,
            "prompt": [
                {
                    "role": "user",
                    "content": TEACHER_PROMPT_TEMPLATE.format(
                        prompt=row["prompt"][0]["content"], solution=row["solution"]
                    ),
                }
            ],
        }
        for row in rows
    ]
    alone = measure(model, tokenizer, privileged, teacher_kwargs, seed=1234)
    after = measure(AutoModelForCausalLM.from_pretrained(str(folder)), tokenizer, rows, kwargs, seed=1234)
    result = {
        "name": f"{name}, {run.base}" if run.warm_to == WARM_TO else f"{name}, {run.base} at {run.warm_to}",
        "seed": seed,
        "base": before.avg_at_k,
        "teacher": alone.avg_at_k,
        "after": after.avg_at_k,
        "gain": list(paired_difference(after.per_question_scores, before.per_question_scores)),
        "length": [before.mean_completion_length, after.mean_completion_length],
        "log": log,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return result


def show(result: dict) -> str:
    """A run in a few lines."""
    gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in result["gain"]))
    lines = [
        f"{result['name']}, seed {result['seed']}: base {result['base']:.3f}, teacher {result['teacher']:.3f}, after "
        f"{result['after']:.3f}, gain {gain}, length {result['length'][0]:.1f} -> {result['length'][1]:.1f}"
    ]
    shown = (
        "reward",
        "divergence",
        "divergence/first_token",
        "divergence/right",
        "divergence/wrong",
        "entropy_gap",
        "student_entropy",
        "target_entropy",
        "top_token_agreement",
    )
    shown += ("completions/mean_length", "clipped_share", "grad_norm")
    steps = [entry for entry in result["log"] if "completions/mean_length" in entry]
    for key in shown:
        values = [entry[key] for entry in steps if key in entry]
        if values:
            lines.append(f"  {key:28}" + " ".join(f"{value:.3f}" for value in values[:3] + values[-3:]))
    return "\n".join(lines)


COLUMNS = (
    "run",
    "base",
    "teacher alone",
    "after, by seed",
    "gain, by seed [95 %]",
    "`divergence/right` over `wrong`",
    "`entropy_gap`",
)


def table(results: list[dict]) -> str:
    """A row a run, its seeds side by side, in Markdown; the last two columns are from the first log."""
    runs: dict[str, list[dict]] = {}
    for result in results:
        runs.setdefault(result["name"], []).append(result)
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(table_row(name, seeds) for name, seeds in runs.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table_row(name: str, seeds: list[dict]) -> list[str]:
    """One row of the table, from the results of all seeds."""
    logs = [next(entry for entry in result["log"] if "completions/mean_length" in entry) for result in seeds]
    parts = [(log.get("divergence/right"), log.get("divergence/wrong")) for log in logs]
    shares = [f"{right / wrong:.2f}" for right, wrong in parts if right is not None and wrong]
    gaps = [f"{log['entropy_gap']:+.3f}" for log in logs if "entropy_gap" in log]
    gains = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in result["gain"])) for result in seeds]
    means = [f"{sum(result[key] for result in seeds) / len(seeds):.3f}" for key in ("base", "teacher")]
    after = [f"{result['after']:.3f}" for result in seeds]
    return [name, *means, *(", ".join(values) or "-" for values in (after, gains, shares, gaps))]


def main() -> None:
    """Run what is asked for and not done yet, print each, and a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/digit_reversal"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--base", choices=list(WARM_SHARES), help="for all runs, instead of their own")
    parser.add_argument("--warm_to", type=float, help="accuracy that bases are warmed up to, for all runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that override a run's")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    overrides = {name: json.loads(value) for name, value in (pair.split("=") for pair in options.set)}
    changes = {name: value for name in ("base", "warm_to") if (value := getattr(options, name)) is not None}
    results = []
    for seed in options.seeds:
        for name in options.only:
            results.append(run_one(name, changes, seed, options.output_dir, overrides))
            print(show(results[-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
