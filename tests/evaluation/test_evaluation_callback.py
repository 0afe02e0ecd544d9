# SPDX-License-Identifier: Apache-2.0
"""Base and model measured within a run: the numbers are those of the models, and the run does not notice."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from trl_opsd import OPSDTrainer
from trl_opsd.demo import build_dataset, build_rows, model_path
from trl_opsd.evaluation.callback import FILE, EvaluationCallback, seed_of_rank
from trl_opsd.evaluation.measures import bootstrap_interval, evaluate, paired_difference

TIMES = ("time/", "step_time", "train_runtime", "per_second", "eval/")
QUICK = {"num_samples": 2, "max_new_tokens": 24, "seed": 3}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)


@pytest.fixture
def build(make_args):
    """A function that makes a trainer of the demo's model with its dropout on."""

    def build(peft_config=None, trainer_class=OPSDTrainer, **settings):
        defaults = {
            "max_steps": 3,
            "max_completion_length": 24,
            "learning_rate": 1e-2,
            "guard": "off",  # at that rate accuracy falls, which it would tell
            "lr_scheduler_type": "constant",
            "logging_steps": 2,
            "chat_template_kwargs": {"enable_thinking": False},
            "teacher_chat_template_kwargs": {"enable_thinking": False},
        }
        return trainer_class(
            model=model_path(),
            args=make_args(**{**defaults, **settings}),
            train_dataset=build_dataset("train", 16),
            peft_config=peft_config,
        )

    return build


def watched(trainer, num_questions=5, **settings):
    callback = EvaluationCallback(trainer, build_rows("test", num_questions), **{**QUICK, **settings})
    trainer.add_callback(callback)
    return callback


def measured_alone(trainer, model, num_questions=5):
    """The same settings by `evaluate` on a model object."""
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "chat_template_kwargs": {"enable_thinking": False}}
    return evaluate(model, trainer.tokenizer, build_rows("test", num_questions), **QUICK, **settings)


def logs_of(trainer):
    """What was logged of the training, without clocks."""
    entries = [entry for entry in trainer.state.log_history if "eval/k" not in entry]
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMES)} for entry in entries]


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval/k" in entry]


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_run_with_measurements_is_bit_for_bit_the_run_without(build, peft_config, kind):
    runs = []
    for looks in (False, True):
        torch.manual_seed(0)
        trainer = build(copy.deepcopy(peft_config), teacher_model_kind=kind, max_steps=4)
        if looks:
            watched(trainer, every=1)
        trainer.train()
        runs.append((weights_of(trainer), logs_of(trainer), torch.get_rng_state()))
        assert len(evaluations(trainer)) == (5 if looks else 0)
    (weights, logs, state), (same_weights, same_logs, same_state) = runs
    assert logs == same_logs and len(logs) == 4  # the first step, two intervals, the run's end
    assert torch.equal(state, same_state)
    for name, value in weights.items():
        assert torch.equal(value, same_weights[name]), name


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_base_and_model_have_the_numbers_they_have_alone(build, peft_config, tmp_path):
    trainer = build(copy.deepcopy(peft_config))
    base = measured_alone(trainer, trainer.model)
    callback = watched(trainer)
    trainer.train()
    model = measured_alone(trainer, trainer.model)
    first, last = evaluations(trainer)
    assert first["step"] == 0 and last["step"] == 3 and "eval/gain" not in first
    for entry, result in ((first, base), (last, model)):
        assert entry["eval/avg@k"] == result.avg_at_k and entry["eval/pass@k"] == result.pass_at_k
        assert entry["eval/majority@k"] == result.majority_at_k and entry["eval/cut_share"] == result.cut_share
        assert entry["eval/completion_length"] == result.mean_completion_length and entry["eval/k"] == 2
        assert entry["eval/reflection_markers_per_1000"] == result.markers_per_1000_tokens
        assert (entry["eval/avg@k_low"], entry["eval/avg@k_high"]) == bootstrap_interval(result.per_question_scores)
    gain = paired_difference(model.per_question_scores, base.per_question_scores)
    assert (last["eval/gain"], last["eval/gain_low"], last["eval/gain_high"]) == gain
    assert model.completions != base.completions
    stored = json.loads((tmp_path / "out" / FILE).read_text())
    assert [record["model"] for record in stored] == ["base", "step 3"]
    assert stored[1]["per_question_scores"] == list(model.per_question_scores)
    assert [line["model"] for line in callback.results()] == ["base", "step 3"]


def test_the_base_is_the_frozen_teacher_also_where_a_run_is_resumed_without_its_file(build, tmp_path):
    trainer = build(save_strategy="steps", save_steps=2)
    base = measured_alone(trainer, trainer.model)
    trainer.train()
    resumed = build(save_strategy="steps", save_steps=2)
    callback = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert callback.results()[0]["avg_at_k"] == base.avg_at_k
    assert callback.results()[0]["mean_completion_length"] == base.mean_completion_length
    assert callback.results()[1]["difference"] is not None


def test_a_resumed_run_reads_its_base_and_goes_on(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "teacher_model_kind": "ema"}
    trainer = build(**settings)
    whole = watched(trainer, every=1)
    trainer.train()
    resumed = build(**settings)
    callback = watched(resumed, every=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert json.dumps(callback.records) == json.dumps(whole.records)
    other = build(**settings)
    watched(other, seed=4)
    with pytest.warns(UserWarning, match="holds no base"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "eval/gain" not in evaluations(other)[-1]


def test_the_card_shows_base_and_last_measurement_and_the_rule(build, tmp_path):
    trainer = build()
    watched(trainer, every=1, name="sums")
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| sums: 5, k = 2 | base |" in text and "| step 3 |" in text and "| step 2 |" not in text
    assert '"checkpoint_rule": "last"' in text and "per_question_scores" not in text
    assert '"evaluation": "off"' in text


def test_a_run_that_picks_a_checkpoint_says_by_what(build):
    trainer = build()
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "loss"
    callback = EvaluationCallback(trainer, build_rows("test", 1), **QUICK)
    assert callback.checkpoint_rule == "best checkpoint by loss (load_best_model_at_end)"


def test_questions_are_put_into_the_students_template(build):
    trainer = build(prompt_template="{prompt} Box it.")
    row = build_rows("test", 1)[0]
    callback = EvaluationCallback(trainer, [row], **QUICK)
    assert callback.rows[0]["prompt"][-1]["content"] == row["prompt"][-1]["content"] + " Box it."
    assert callback.sampling["max_new_tokens"] == 24 and callback.chat_template_kwargs == {"enable_thinking": False}


def test_what_cannot_be_measured_is_refused_before_training(build):
    trainer = build()
    rows = build_rows("test", 1)
    with pytest.raises(ValueError, match="rows is empty"):
        EvaluationCallback(trainer, [])
    with pytest.raises(ValueError, match="every is 0"):
        EvaluationCallback(trainer, rows, every=0)
    with pytest.raises(ValueError, match="num_samples is 16 at temperature 0"):
        EvaluationCallback(trainer, rows, temperature=0)
    with pytest.warns(UserWarning, match="1 of 1 solutions hold no answer"):
        EvaluationCallback(trainer, [{**rows[0], "solution": "clearly"}])


@pytest.mark.parametrize(("num_rows", "world"), [(1, 2), (5, 2), (7, 4), (8, 4), (2, 8)])
def test_every_rank_has_as_many_questions_and_each_question_comes_once(build, monkeypatch, num_rows, world):
    """Ranks one after the other in this process, with a stand-in for the sampling."""
    from trl_opsd.evaluation import callback as module

    trainer = build()
    callback = EvaluationCallback(trainer, build_rows("test", num_rows), **QUICK)
    asked, parts = [], []
    monkeypatch.setattr(
        module, "generate_completions", lambda model, tokenizer, prompts, **k: asked.append(len(prompts)) or prompts
    )
    monkeypatch.setattr(module, "gather_object", lambda given: parts.extend(given) or parts)
    answer = None
    for rank in range(world):
        monkeypatch.setattr(
            trainer, "accelerator", SimpleNamespace(process_index=rank, num_processes=world, unwrap_model=lambda m: m)
        )
        monkeypatch.setattr(module, "model_for_generation", lambda trainer: module.nullcontext())
        try:
            answer = callback._sample()
        except KeyError:
            assert rank < world - 1
    assert len(set(asked)) == 1 and len(asked) == world
    assert answer == [row["prompt"] for row in callback.rows]


def test_ranks_draw_differently_and_the_first_as_one_process_does():
    seeds = [seed_of_rank(seed, rank) for seed in range(20) for rank in range(20)]
    assert len(set(seeds)) == 400 and [seed_of_rank(seed, 0) for seed in range(3)] == [0, 1, 2]
    assert np.all(np.asarray(seeds) < 2**63)


def test_samples_of_every_measurement_are_written_where_they_are_asked_for(build):
    trainer = build(max_steps=1)
    watched(trainer, num_questions=2, samples=True)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert {path.name for path in folder.glob("samples-*")} == {"samples-base.jsonl", "samples-step-1.jsonl"}
    measured = json.loads((folder / FILE).read_text())
    for record, name in zip(measured, ("base", "step-1"), strict=True):
        lines = [json.loads(line) for line in (folder / f"samples-{name}.jsonl").read_text().splitlines()]
        assert [(line["question"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert sum(line["score"] for line in lines) / 4 == pytest.approx(record["avg_at_k"])
        assert sum(line["length"] for line in lines) / 4 == pytest.approx(record["mean_completion_length"])
        assert {line["model"] for line in lines} == {record["model"]} and "verdicts" not in record
