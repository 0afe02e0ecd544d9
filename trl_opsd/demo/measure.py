# SPDX-License-Identifier: Apache-2.0
"""What the demo model does with each prompt it knows: alone, with a reference, with a wrong one."""

import random
from collections.abc import Sequence
from typing import Any

from ..evaluation.measures import EvaluationResult, evaluate
from . import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE
from .corpus import PLAIN, write_until
from .task import NUM_OPERATIONS, draw_problems

TOKENS_A_STEP = 24  # of an attempt: its step, and the same again after most of its slips


def longest_attempt(num_operations: Sequence[int] = NUM_OPERATIONS) -> int:
    """The limit of an attempt in tokens, at which hardly any is cut."""
    return TOKENS_A_STEP * max(num_operations)


def build_views(
    split: str, num_problems: int, *, seed: int = 0, num_operations: Sequence[int] = NUM_OPERATIONS
) -> dict[str, list[dict[str, Any]]]:
    """The same problems as rows of every prompt, by the prompt's name."""
    problems = draw_problems(split, num_problems, seed=seed, num_operations=num_operations)
    generator = random.Random(f"views/{seed}")
    wrong = [write_until(problem, PLAIN, generator, correct=False, marker=False).text for problem in problems]
    right = [problem.solution for problem in problems]

    def rows(template: str, references: list[str]) -> list[dict[str, Any]]:
        texts = [
            template.format(prompt=problem.question, solution=reference)
            for problem, reference in zip(problems, references, strict=True)
        ]
        return [
            {"prompt": [{"role": "user", "content": text}], "solution": problem.solution}
            for problem, text in zip(problems, texts, strict=True)
        ]

    return {
        "plain": rows("{prompt}", right),
        "solution": rows(TEACHER_PROMPT_TEMPLATE, right),
        "wrong attempt": rows(TEACHER_PROMPT_TEMPLATE, wrong),
        "stranger": rows(TEACHER_PROMPT_TEMPLATE, right[1:] + right[:1]),
        "reference only": rows(REFERENCE_ONLY_TEMPLATE, right),
    }


def measure(
    model, tokenizer, *, num_problems: int = 300, seed: int = 0, num_operations: Sequence[int] = NUM_OPERATIONS
) -> dict[str, EvaluationResult]:
    """Every view of validation problems at temperature 1, and `plain` greedily too."""
    views = build_views("validation", num_problems, seed=seed, num_operations=num_operations)
    settings = {"max_new_tokens": longest_attempt(num_operations), "batch_size": 512, "seed": seed}
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    results = {
        "plain, greedy": evaluate(
            model,
            tokenizer,
            views["plain"],
            num_samples=1,
            temperature=0.0,
            chat_template_kwargs=off,
            **settings,
        )
    }
    for name, rows in views.items():
        results[name] = evaluate(model, tokenizer, rows, chat_template_kwargs=off, **settings)
    for name in ("plain", "solution"):
        results[f"{name}, thinking"] = evaluate(model, tokenizer, views[name], chat_template_kwargs=on, **settings)
    return results


def format_results(results: dict[str, EvaluationResult]) -> str:
    """A Markdown table, one prompt a line."""
    lines = [
        "| prompt | avg@k | majority@k | tokens | cut | markers per 1,000 tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        shares = f"{result.avg_at_k:.3f} | {result.majority_at_k:.3f}"
        lengths = f"{result.mean_completion_length:.1f} | {result.cut_share:.3f}"
        lines.append(f"| {name} | {shares} | {lengths} | {result.markers_per_1000_tokens:.1f} |")
    return "\n".join(lines)
