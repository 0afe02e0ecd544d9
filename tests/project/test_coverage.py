# SPDX-License-Identifier: Apache-2.0
"""The study of contexts and coverage: its rows and its table by hand, and a tiny run of it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import coverage

from trl_opsd.demo import model_path


def test_a_cell_trains_on_its_questions_again_and_again_and_a_poor_context_is_the_answer_alone():
    rich, poor = (coverage.training_rows(coverage.Cell(kind, 3, "still"), 7) for kind in ("rich", "poor"))
    assert len(rich) == 7 and rich[:3] == rich[3:6] and len({row["prompt"][0]["content"] for row in rich}) == 3
    assert [row["prompt"] for row in rich] == [row["prompt"] for row in poor]
    for whole, bare in zip(rich, poor, strict=True):
        assert whole["solution"].endswith(f"\n{bare['solution']}") and bare["solution"].startswith("\\boxed{")


def test_the_table_has_gains_over_the_base_and_markers_within_and_beyond():
    def record(within, beyond, words):
        return {
            "within_scores": within,
            "beyond_scores": beyond,
            "within_words": words,
            "beyond_words": 2 * words,
            "within_substrings": 3.0,
            "beyond_substrings": 4.0,
        }

    rows = {
        "base": [record([0.5, 0.5], [0.5, 0.0], 1.0)],
        "rich-8-still": [record([1.0, 1.0], [0.0, 0.0], 5.0), record([1.0, 0.5], [0.0, 0.0], 7.0)],
    }
    base, other = coverage.table(rows).splitlines()[2:]
    assert base == "| base | 0.500 | 0.250 | 1.0 / 2.0 | 3.0 / 4.0 |"
    assert other.startswith("| rich-8-still | 0.875, +37.5 [") and "0.000, -25.0 [" in other and "6.0 / 12.0" in other


def test_markers_are_counted_by_words_and_by_substrings_per_thousand_tokens(monkeypatch):
    asked = []

    def evaluate(model, tokenizer, rows, **settings):
        asked.append(len(rows[0]["solution"].split("\n")) - 1)
        texts = [[SimpleNamespace(text="Wait, I await it.")], [SimpleNamespace(text="It seems so, maybe.")]]
        return SimpleNamespace(per_question_scores=(1.0, 0.0), completions=texts, mean_completion_length=10.0)

    monkeypatch.setattr("trl_opsd.evaluation.measures.evaluate", evaluate)
    record = coverage.measure(model_path(), 2, seed=0)
    # Of 20 tokens: wait and maybe by words; await and seems too where the study counts.
    assert (record["within_words"], record["within_substrings"]) == (100.0, 200.0)
    assert record["within_scores"] == [1.0, 0.0] and asked[0] in (2, 3, 4) and asked[1] in coverage.LONGER


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_cell_is_trained_measured_and_not_run_again(tmp_path, monkeypatch):
    overrides = {"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    monkeypatch.setattr(coverage.miniature, "ROLLOUTS", 4)
    monkeypatch.setattr(coverage, "MEASURED", {**coverage.MEASURED, "num_samples": 1, "max_new_tokens": 48})
    cell = coverage.Cell("poor", 2, "moving")
    record = coverage.run_one(cell, tmp_path, 0, overrides, 2)
    assert len(record["within_scores"]) == len(record["beyond_scores"]) == 2
    assert (tmp_path / "poor-2-moving-0" / "model.safetensors").exists()
    monkeypatch.setattr(coverage.miniature, "make_trainer", None)
    assert coverage.run_one(cell, tmp_path, 0, overrides, 2) == json.loads(json.dumps(record))
