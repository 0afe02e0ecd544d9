# SPDX-License-Identifier: Apache-2.0
"""The bed of runs that hurt: its rows, and in which thinking mode a base is warmed, trained and measured."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import digit_reversal

from trl_opsd.demo import model_path


def test_solutions_reverse_the_digits_and_no_number_is_in_both_splits():
    test, train = (digit_reversal.build_rows(split, 100) for split in ("test", "train"))
    numbers = [{row["prompt"][0]["content"] for row in rows} for rows in (test, train)]
    assert not numbers[0] & numbers[1] and [len(own) for own in numbers] == [100, 100]
    assert digit_reversal.solution_of("1234") == "123:4\n12:43\n1:432\n\\boxed{4321}"


@pytest.mark.parametrize(
    ("name", "trained", "measured"),
    [
        ("OPSD", True, True),
        ("OPSD, thinking off in both", False, False),
        ("OPSD, trained in the mode that the base has not learnt", False, True),
    ],
)
def test_base_and_result_are_measured_in_the_mode_that_the_base_was_warmed_in(
    name, trained, measured, tmp_path, monkeypatch
):
    modes = {"warmed": [], "trained": [], "measured": []}

    def warm(kind, folder, thinking, accuracy):
        modes["warmed"].append(thinking)
        return model_path()

    def train(run, base, folder, seed, overrides):
        modes["trained"].append(run.thinking)
        folder.mkdir(parents=True)
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda path: None)
        return []

    def measure(model, tokenizer, rows, kwargs, *, seed):
        modes["measured"].append(kwargs["enable_thinking"])
        return SimpleNamespace(avg_at_k=0.5, per_question_scores=(0.0, 1.0), mean_completion_length=3.0)

    for function in (warm, train, measure):
        monkeypatch.setattr(digit_reversal, function.__name__, function)
    digit_reversal.run_one(name, {}, 0, tmp_path, {})
    assert modes == {"warmed": [measured], "trained": [trained], "measured": [measured] * 3}
