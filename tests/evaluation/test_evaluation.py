# SPDX-License-Identifier: Apache-2.0
"""Estimators against second derivations; sampling on the demo model."""

import itertools
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.demo import build_rows, model_path
from trl_opsd.evaluation.measures import (
    bootstrap_interval,
    estimate_pass_at_k,
    evaluate,
    majority_is_correct,
    paired_difference,
    summarize,
)
from trl_opsd.evaluation.sampling import Completion, generate_completions, render_prompt
from trl_opsd.monitoring.markers import EPISTEMIC_MARKERS, count_markers, find_markers
from trl_opsd.verification import verifies, verify

GENERATION = {"max_new_tokens": 40, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert estimate_pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="k is 5"):
        estimate_pass_at_k(4, 1, 5)


def test_verify_reads_answers_and_survives_anything():
    assert verify("so \\boxed{\\frac{1}{2}}", "\\boxed{0.5}")
    assert not verify("\\boxed{3}", "\\boxed{4}")
    assert not verify("", "\\boxed{4}")
    assert not verify("\\boxed{4}", "none")
    assert not verify("\\boxed{\\frac{}{}{{{}", "\\boxed{4}")
    assert verifies(" \\boxed{4} ") and not verifies("no answer")


def test_verify_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(verify("\\boxed{2/7}", "\\boxed{4/14}")))
    thread.start()
    thread.join()
    assert found == [True]


def test_majority_counts_readable_answers_and_the_earliest_wins_a_tie():
    right, wrong, silent = "\\boxed{4}", "\\boxed{5}", "no answer"
    assert majority_is_correct([wrong, right, right], right)
    assert not majority_is_correct([wrong, wrong, right], right)
    assert majority_is_correct([silent, silent, right], right)
    assert majority_is_correct([right, wrong], right) and not majority_is_correct([wrong, right], right)
    assert not majority_is_correct([silent], right)


def test_summary_of_hand_made_samples():
    samples = [
        [Completion("wait \\boxed{1}", 5, False), Completion("\\boxed{2}", 5, False)],
        [Completion("Wait, maybe \\boxed{9}", 10, True), Completion("\\boxed{9}", 5, False)],
    ]
    result = summarize(samples, ["\\boxed{1}", "\\boxed{3}"])
    assert result.per_question_scores == (0.5, 0.0)
    assert result.avg_at_k == 0.25 and result.pass_at_k == 0.5 and result.majority_at_k == 0.5
    assert result.pass_at(1) == result.avg_at_k and result.pass_at(2) == result.pass_at_k
    assert result.mean_completion_length == 6.25 and result.cut_share == 0.25
    assert result.markers_per_1000_tokens == pytest.approx(3 / 25 * 1000)
    with pytest.raises(ValueError, match="rows is empty"):
        summarize([], [])


def test_markers_are_whole_words_in_any_case():
    assert count_markers("Wait, await waiting; wait!\nHmm") == 3
    assert count_markers("a check, a rethink", ("rethink", "check")) == 2
    assert count_markers("wait", ()) == 0


def test_markers_within_longer_words_count_only_as_substrings():
    text = "I await the checkout. Wait, it SEEMS likelier, perhaps."
    assert count_markers(text, EPISTEMIC_MARKERS) == 3  # wait, seems, perhaps
    assert count_markers(text, EPISTEMIC_MARKERS, whole_words=False) == 5  # await, checkout too
    assert find_markers("await", ("wait",), whole_words=False) == [(1, 5)] and find_markers("await", ("wait",)) == []


def test_bootstrap_agrees_with_the_normal_interval():
    scores = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(scores)
    error = scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_interval(scores) == (low, high) != bootstrap_interval(scores, seed=1)
    narrow = bootstrap_interval(scores, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap_interval(scores, level=95)


def test_a_paired_difference_uses_the_pairing():
    before = np.random.default_rng(2).random(200)
    difference = paired_difference(before + 0.1, before)
    assert difference == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0], [1.0, 0.0])


def test_batching_and_padding_do_not_change_greedy_answers(model, tokenizer):
    prompts = [row["prompt"] for row in build_rows("validation", 9)]
    one, many = (
        generate_completions(model, tokenizer, prompts, temperature=0.0, batch_size=size, **GENERATION)
        for size in (1, 9)
    )
    assert one == many


def test_samples_are_a_function_of_the_seed_and_leave_the_random_state(model, tokenizer):
    prompts = [row["prompt"] for row in build_rows("validation", 6)]
    model.train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, same, other = (
        generate_completions(model, tokenizer, prompts, num_samples=3, seed=seed, **GENERATION) for seed in (1, 1, 2)
    )
    assert first == same != other
    assert [len(group) for group in first] == [3] * 6
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    model.eval()


def test_a_completion_at_the_limit_is_cut(model, tokenizer):
    prompts = [row["prompt"] for row in build_rows("validation", 2)]
    settings = {**GENERATION, "max_new_tokens": 3}
    for (completion,) in generate_completions(model, tokenizer, prompts, temperature=0.0, **settings):
        assert completion.is_cut and completion.num_tokens == 3
    with pytest.raises(ValueError, match="num_samples is 2"):
        generate_completions(model, tokenizer, prompts, num_samples=2, temperature=0.0)


def test_plain_text_prompts_are_taken_as_they_are(tokenizer):
    assert render_prompt(tokenizer, "1+1") == tokenizer.encode("1+1")


def test_evaluate_scores_each_row(model, tokenizer):
    rows = build_rows("validation", 6)
    result = evaluate(model, tokenizer, rows, num_samples=2, **GENERATION)
    assert len(result.per_question_scores) == 6
    for row, score, group in zip(rows, result.per_question_scores, result.completions, strict=True):
        assert score == np.mean([verify(sample.text, row["solution"]) for sample in group])
