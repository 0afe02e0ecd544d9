# SPDX-License-Identifier: Apache-2.0
"""Logs that inspect-ai itself reads again: samples, scores and numbers of an evaluation."""

import json
from collections import Counter
from importlib.util import find_spec

import pytest

from trl_opsd.commands import cli
from trl_opsd.demo import build_rows, model_path
from trl_opsd.evaluation.inspect_log import SCORER, write_inspect_log

pytestmark = [
    pytest.mark.skipif(
        find_spec("inspect_ai") is None, reason="inspect-ai is not installed: `pip install 'trl-opsd[inspect-ai]'`"
    ),
    pytest.mark.filterwarnings("default"),  # its own imports warn freely
]
SETTINGS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 40, "verifier": "math"}


def line(question, seed, **changed):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{question}+1=?"}]
    told = {"completion": "so 2", "answer": "2", "score": 1, "unscored": False, "length": 3, "cut": False}
    source = {"model": "org/name", "dataset": "folder/sums.jsonl", "seed": seed, "question": question, "sample": 0}
    return {**source, "prompt": prompt, "solution": "\\boxed{2}", **told, **changed}


def test_a_log_of_every_model_and_set_is_read_again(tmp_path):
    from inspect_ai.log import list_eval_logs, read_eval_log

    questions, logs, samples = tmp_path / "sums.jsonl", tmp_path / "logs", tmp_path / "samples.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in build_rows("test", 3)))
    words = ["eval", "--models", model_path(), "--datasets", str(questions), "--num_samples", "2", "--seeds", "0", "1"]
    words += [
        "--temperature",
        "1.5",
        "--max_new_tokens",
        "40",
        "--thinking",
        "off",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert cli.main([*words, "--inspect_logs", str(logs), "--samples", str(samples)]) == 0
    (found,) = list_eval_logs(str(logs))
    log = read_eval_log(found)
    lines = [json.loads(text) for text in samples.read_text().splitlines()]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())[0]
    metrics = log.results.scores[0].metrics
    assert metrics["accuracy"].value == pytest.approx(summary["avg_at_k"])
    assert metrics["mean_length"].value == pytest.approx(summary["mean_completion_length"])
    assert metrics["cut_share"].value == pytest.approx(summary["cut_share"])
    assert (log.status, log.eval.task, log.eval.config.epochs) == ("success", "sums", 4)
    assert log.eval.model_generate_config.max_tokens == 40 and log.eval.metadata["verifier"] == "math"
    assert {(sample.id, sample.epoch) for sample in log.samples} == {(q, e) for q in range(3) for e in (1, 2, 3, 4)}
    epochs = Counter()
    by_place = {(sample.id, sample.epoch): sample for sample in log.samples}
    for one in lines:
        epochs[one["question"]] += 1
        sample = by_place[one["question"], epochs[one["question"]]]
        assert (sample.metadata["seed"], sample.metadata["sample"]) == (one["seed"], one["sample"])
        assert sample.messages[0].text == one["prompt"][0]["content"] and sample.target == one["solution"]
        assert sample.output.completion == sample.messages[-1].text == one["completion"]
        assert sample.output.stop_reason == ("max_tokens" if one["cut"] else "stop")
        assert sample.scores[SCORER].value == ("C" if one["score"] else "I")
        assert sample.scores[SCORER].answer == one["answer"] and sample.output.usage.output_tokens == one["length"]


def test_roles_text_prompts_and_what_was_not_scored(tmp_path):
    from inspect_ai.log import read_eval_log

    lines = [
        line(0, 0),
        line(1, 0, score=None, unscored=True),
        line(0, 1, prompt="0+1=?", score=0),
        line(1, 1, cut=True),
    ]
    write_inspect_log(tmp_path / "one.eval", lines, SETTINGS)
    log = read_eval_log(str(tmp_path / "one.eval"))
    roles = [[message.role for message in sample.messages] for sample in log.samples]
    assert roles == [["system", "user", "assistant"]] * 2 + [["user", "assistant"], ["system", "user", "assistant"]]
    by_place = {(sample.id, sample.epoch): sample for sample in log.samples}
    assert by_place[1, 1].scores[SCORER].value == "N" and "out of time" in by_place[1, 1].scores[SCORER].explanation
    assert by_place[0, 2].input == "0+1=?" and by_place[0, 2].scores[SCORER].value == "I"
    assert by_place[1, 2].output.stop_reason == "max_tokens" and by_place[1, 2].metadata["seed"] == 1
    score = log.results.scores[0]
    assert score.metrics["accuracy"].value == 0.5 and (score.scored_samples, score.unscored_samples) == (3, 1)
