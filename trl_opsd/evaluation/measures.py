# SPDX-License-Identifier: Apache-2.0
"""Verifying samples and honest numbers: avg@k, pass@k, majority@k and bootstrap intervals over questions.

Base and trained model are measured by the same call, with the same settings, in the same run.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..monitoring.markers import REFLECTION_MARKERS, count_markers
from ..verification import Verdict, start_verifying
from .sampling import Completion, Prompt, generate_completions, render_prompt

__all__ = [
    "Completion",
    "EvaluationResult",
    "Interval",
    "Prompt",
    "bootstrap_interval",
    "estimate_pass_at_k",
    "evaluate",
    "generate_completions",
    "majority_is_correct",
    "paired_difference",
    "render_prompt",
    "summarize",
]


class Interval(NamedTuple):
    """An estimate and the ends of its bootstrap interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers of one model on one set of questions.

    Attributes:
        num_samples (`int`): k, samples per question.
        avg_at_k (`float`): mean accuracy over samples and questions, in [0, 1].
        pass_at_k (`float`): share of questions with at least one right answer among k, in [0, 1].
        majority_at_k (`float`): share of questions whose most frequent answer is right, in [0, 1].
        per_question_scores (`tuple[float, ...]`): accuracy of each question, in the order of the rows.
        mean_completion_length (`float`): tokens, the eos token included.
        cut_share (`float`): share of completions that reached the length limit, in [0, 1].
        markers_per_1000_tokens (`float`): reflection markers per 1,000 completion tokens.
        unscored_share (`float`): share of completions whose verification ran out of time, in [0, 1]; they count as wrong.
        completions (`tuple[tuple[Completion, ...], ...]`): all samples of each question.
        verdicts (`tuple[tuple[Verdict, ...], ...]`): what came of verifying each of them.
    """

    num_samples: int
    avg_at_k: float
    pass_at_k: float
    majority_at_k: float
    per_question_scores: tuple[float, ...]
    mean_completion_length: float
    cut_share: float
    markers_per_1000_tokens: float
    unscored_share: float
    completions: tuple[tuple[Completion, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...] = ()

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k for any k up to `num_samples`."""
        counts = [round(score * self.num_samples) for score in self.per_question_scores]
        return float(np.mean([estimate_pass_at_k(self.num_samples, count, k) for count in counts]))


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}; it must lie in 1..{num_samples}, the number of samples.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_is_correct(completions: Sequence[str], solution: str, verifier: str = "math") -> bool:
    """Whether the most frequent answer is right; the earliest wins a tie, unreadable ones do not vote."""
    return _majority_is_right(start_verifying([(text, solution) for text in completions], verifier)())


def _majority_is_right(verdicts: Sequence[Verdict]) -> bool:
    votes = Counter(verdict.answer for verdict in verdicts if verdict.answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return bool(next(verdict for verdict in verdicts if verdict.answer == winner).is_right)


def evaluate(
    model,
    tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    num_samples: int = 4,
    markers: Sequence[str] = REFLECTION_MARKERS,
    verifier: str = "math",
    **generation: Any,
) -> EvaluationResult:
    """Samples and verifies every row of `prompt` and `solution`.

    Args:
        model, tokenizer: as in [`generate_completions`].
        rows (`Sequence[Mapping]`): questions with a `prompt` and a `solution` that verifies.
        num_samples (`int`): k of avg@k, pass@k and majority@k.
        markers (`Sequence[str]`): words counted as reflection markers.
        verifier (`str`): what compares answers: `math`, `exact`, `choice` or `module:function`.
        **generation: further arguments of [`generate_completions`].

    Returns:
        [`EvaluationResult`]
    """
    rows = list(rows)
    prompts = [row["prompt"] for row in rows]
    samples = generate_completions(model, tokenizer, prompts, num_samples=num_samples, **generation)
    return summarize(samples, [row["solution"] for row in rows], markers, verifier)


def summarize(
    samples: Sequence[Sequence[Completion]],
    solutions: Sequence[str],
    markers: Sequence[str] = REFLECTION_MARKERS,
    verifier: str = "math",
) -> EvaluationResult:
    """Numbers of samples made elsewhere, the same count for every question; arguments as in [`evaluate`]."""
    if not samples:
        raise ValueError("rows is empty; give at least one question.")
    flat = [sample for group in samples for sample in group]
    num_samples, num_tokens = len(samples[0]), sum(sample.num_tokens for sample in flat)
    pairs = [(one.text, solution) for group, solution in zip(samples, solutions, strict=True) for one in group]
    verdicts = start_verifying(pairs, verifier)()
    by_question = [verdicts[start : start + num_samples] for start in range(0, len(verdicts), num_samples)]
    counts = [sum(verdict.is_right is True for verdict in group) for group in by_question]
    return EvaluationResult(
        num_samples=num_samples,
        avg_at_k=float(np.mean(counts) / num_samples),
        pass_at_k=float(np.mean([count > 0 for count in counts])),
        majority_at_k=float(np.mean([_majority_is_right(group) for group in by_question])),
        per_question_scores=tuple(count / num_samples for count in counts),
        mean_completion_length=num_tokens / len(flat),
        cut_share=float(np.mean([sample.is_cut for sample in flat])),
        markers_per_1000_tokens=1000 * sum(count_markers(sample.text, markers) for sample in flat) / max(1, num_tokens),
        unscored_share=float(np.mean([verdict.ran_out for verdict in verdicts])),
        completions=tuple(tuple(group) for group in samples),
        verdicts=tuple(tuple(group) for group in by_question),
    )


def bootstrap_interval(
    per_question_scores: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, drawing questions with replacement.

    Args:
        per_question_scores (`Sequence[float]`): one score per question.
        level (`float`): coverage in (0, 1).
        resamples (`int`): bootstrap draws.
        seed (`int`): seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; set it between 0 and 1, for example 0.95.")
    scores = np.asarray(per_question_scores, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 100):  # in blocks, so that many questions need little memory
        block = means[start : start + 100]
        block[:] = scores[generator.integers(len(scores), size=(len(block), len(scores)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    after: Sequence[float],
    before: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of `after - before` over the same questions, with its bootstrap interval over questions."""
    if len(after) != len(before):
        raise ValueError(f"after has {len(after)} questions and before {len(before)}; score the same questions.")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return Interval(
        float(difference.mean()), *bootstrap_interval(difference, level=level, resamples=resamples, seed=seed)
    )
