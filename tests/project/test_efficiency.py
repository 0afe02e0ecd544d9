# SPDX-License-Identifier: Apache-2.0
"""The benchmark of tokens to an accuracy: its numbers by hand, and a tiny run of it."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import efficiency
import miniature


def result(name, rate, seed, tokens, scores):
    return {"name": name, "rate": rate, "seed": seed, "tokens": tokens, "scores": scores}


@pytest.mark.parametrize(
    ("level", "tokens"),
    [(0.2, 0.0), (0.4, 100.0), (0.5, 150.0), (0.9, 262.5), (0.95, math.inf)],
)
def test_tokens_to_an_accuracy_are_linear_between_measurements_and_infinite_where_it_is_never_reached(level, tokens):
    # Up from 0.2 over 0.4 to 0.6; then 0.5, a fall, which does not count; then 0.9 at 262.5 of the last stretch.
    curve = ([0, 100, 200, 250, 262.5], [0.2, 0.4, 0.6, 0.5, 0.9])
    assert efficiency.tokens_to(level, *curve) == pytest.approx(tokens)


def test_a_level_within_the_base_costs_nothing():
    assert efficiency.tokens_to(0.1, [0, 10], [0.5, 0.4]) == 0


def test_the_interval_of_a_level_that_some_draws_never_reach_is_open():
    assert efficiency.interval([1.0] * 90 + [math.inf] * 10) == (1.0, math.inf)
    assert efficiency.interval(range(1000)) == (24.0, 974.0)


def test_each_method_gets_the_rate_whose_mean_accuracy_behind_the_base_is_best():
    results = [
        result("A", 1e-4, 0, [0, 1, 2], [[1.0, 1.0], [0.2, 0.2], [0.4, 0.4]]),
        result("A", 1e-3, 0, [0, 1, 2], [[0.0, 0.0], [0.5, 0.5], [0.3, 0.3]]),
        result("B", 1e-4, 0, [0, 1, 2], [[0.0, 0.0], [0.9, 0.9], [0.1, 0.1]]),
    ]
    assert efficiency.choose_rates(results) == {"A": 1e-3, "B": 1e-4}
    assert efficiency.rates_table(results).splitlines()[2:] == [
        "| A | 0.300 | 0.400 | 0.001 |",
        "| B | 0.500 |  | 0.0001 |",
    ]


def test_a_curve_is_the_mean_over_seeds_and_a_ratio_is_to_grpo():
    twice = [
        result("GRPO", 1e-3, 0, [0, 100, 200], [[0, 0], [0, 0], [1, 1]]),
        result("GRPO", 1e-3, 1, [0, 300, 600], [[0, 0], [0, 0], [1, 1]]),
        result("OPSD", 1e-3, 0, [0, 100, 200], [[0, 0], [1, 1], [1, 1]]),
        result("SFT on references", 1e-3, 0, [0, 100, 200], [[0, 0], [0, 0], [0, 0]]),
    ]
    curves = efficiency.curves_of(twice)
    assert curves["GRPO"].tokens.tolist() == [0, 200, 400]
    ((grpo,), (opsd,), (sft,)) = efficiency.reduce(curves, [0.5]).values()
    assert (grpo["tokens"], opsd["tokens"], sft["tokens"]) == (300, 50, math.inf)
    assert opsd["ratio"] == 6 and opsd["ratio_interval"] == (6, 6) and opsd["interval"] == (50, 50)
    assert grpo["ratio"] == 1 and "ratio" not in sft
    line = efficiency.tokens_table(curves, [0.5], {"GRPO": 1e-3, "OPSD": 1e-3, "SFT on references": 1e-4})
    assert "| OPSD | 0.001 | 0.000 | 1.000 | 0.1 [0.1, 0.1], 6.00 [6.00, 6.00] |" in line
    assert "| SFT on references | 0.0001 | 0.000 | 0.000 | > 0.2 [> 0.2, > 0.2] |" in line


def test_the_interval_comes_from_drawing_problems():
    # Of ten problems five are right at once and five never: half of them is reached, more depends on the draw.
    scores = np.array([[0.0] * 10, [1.0] * 5 + [0.0] * 5])
    curves = {"OPSD": efficiency.Curve(np.array([0.0, 100.0]), scores)}
    (cell,) = efficiency.reduce(curves, [0.4])["OPSD"]
    assert cell["tokens"] == pytest.approx(80)
    low, high = cell["interval"]
    assert low == pytest.approx(50) and high == math.inf  # of 8 right ones, and of 3 or fewer


def test_on_the_hard_base_lengths_grow_where_a_method_has_some():
    plan = efficiency.Plan(Path("x"), hard="folder")
    steered = efficiency.settings_of(plan, miniature.RUNS["OGLS-SD"], 1e-3)
    assert steered["max_completion_length"] == steered["distillation_length"] == efficiency.HARD_LIMIT
    assert "max_completion_length" not in efficiency.settings_of(plan, miniature.RUNS["SFT on references"], 1e-3)
    assert plan.rows("test", 1)[0]["solution"].count("\n") in (8, 9, 10)
    assert efficiency.Plan(Path("x")).rows("test", 1)[0]["solution"].count("\n") in (2, 3, 4)


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_run_prints_both_tables_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(efficiency, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    monkeypatch.setattr(miniature, "SETTINGS", {**miniature.SETTINGS, "per_device_train_batch_size": 8})
    monkeypatch.setattr(miniature, "ROLLOUTS", 8)
    names = ["OPSD", "GRPO", "SFT on references"]
    words = ["--output_dir", str(tmp_path), "--methods", *names, "--rates", "1e-3", "--seeds", "0", "--levels", "0.0"]
    words += ["--steps", "2", "--every", "1", "--problems", "4", "--samples", "2", "--training_problems", "32"]
    efficiency.main(words)
    printed = capsys.readouterr().out
    assert all(f"| {name} | 0.001 | " in printed for name in names) and (tmp_path / "efficiency.png").stat().st_size
    curves = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("test/*/curve.json")}
    assert len(curves) == 3
    for curve in curves.values():
        assert curve["steps"] == [0, 1, 2] and curve["tokens"][0] == 0 < curve["tokens"][1] < curve["tokens"][2]
        assert [len(scores) for scores in curve["scores"]] == [4] * 3
        assert curve["scores"][0] == curves["grpo-0.001-0"]["scores"][0]  # the same base, the same samples
    monkeypatch.setattr(miniature, "make_trainer", None)
    efficiency.main(words)
    assert capsys.readouterr().out.splitlines()[-3:] == printed.splitlines()[-3:]
