# SPDX-License-Identifier: Apache-2.0
"""What the processor does once a generation batch, it does once: rollouts are decoded by TRL, prompts were checked at the start."""

import threading

import pytest
import torch
from datasets import Dataset
from steps import make_trainer
from transformers import PreTrainedTokenizerBase

from trl_opsd import PurifiedOPSDTrainer
from trl_opsd.teacher.prompts import TeacherCollator


@pytest.fixture
def decoded(monkeypatch):
    """How many texts each call decodes."""
    calls, decode = [], PreTrainedTokenizerBase.batch_decode

    def recorded(self, sequences, *args, **kwargs):
        calls.append(len(sequences))
        return decode(self, sequences, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", recorded)
    return calls


@pytest.fixture
def encoded(monkeypatch):
    """Templates of the contexts that are encoded."""
    calls, encode = [], TeacherCollator.encode

    def recorded(collator, prompt, context):
        calls.append(context.template)
        return encode(collator, prompt, context)

    monkeypatch.setattr(TeacherCollator, "encode", recorded)
    return calls


def test_rollouts_are_decoded_once(build, decoded):
    trainer = build()
    texts = []
    reward = trainer.reward_funcs[0]
    trainer.reward_funcs[0] = lambda completions, **columns: texts.extend(completions) or [0.0] * len(completions)
    trainer.reward_funcs[0].__name__ = reward.__name__
    decoded.clear()
    trainer.train()
    assert decoded == [4]  # by TRL
    assert trainer._batch.texts == [turns[0]["content"] for turns in texts[-4:]]
    expected = trainer.tokenizer.batch_decode(trainer._batch.ids, skip_special_tokens=True)
    assert trainer._batch.texts == expected


def test_rollouts_that_trl_parses_are_decoded_for_the_teacher(build):
    trainer = build()
    assert trainer.texts_of([[{"role": "assistant", "content": "a"}]]) == ["a"] and trainer.texts_of(["a"]) == ["a"]
    trainer._tokenizer.response_schema = {"type": "object"}
    assert trainer.texts_of([[{"role": "assistant", "content": "a"}]]) is None


def test_prompts_of_a_checked_dataset_are_not_encoded_again_before_sampling(build, encoded):
    trainer = build()
    encoded.clear()
    trainer.train()
    assert set(encoded) == {"teacher"}


def test_prompts_of_a_stream_are_checked_when_they_come(build, make_model, make_args, dataset, tokenizer):
    trainer = build(model=make_model(torch.float64, max_position_embeddings=512), max_completion_length=8)
    rows = [*dataset.select(range(3)), {"prompt": [{"role": "user", "content": "1+" * 300}], "solution": "1"}]
    trainer.targets.rows_are_checked = False
    with pytest.raises(ValueError, match="generation batch row 3: `prompt`: A prompt has"):
        trainer.targets.prepare(rows, "train", trainer._moment())
    streaming = make_trainer(make_model, make_args, dataset.to_iterable_dataset(), tokenizer)
    assert not streaming.targets.rows_are_checked and build().targets.rows_are_checked
    # A problem that is read twice is counted once before training, so it is looked at when it comes.
    assert build(prompt_template="{prompt} Again: {prompt}").targets.rows_are_checked is False
    assert build(prompt_template="Q: {prompt}").targets.rows_are_checked is True


def test_what_is_encoded_ahead_has_the_rows_columns_and_the_students_own_template(
    make_model, make_args, dataset, tokenizer, monkeypatch
):
    by_main, encode = [], TeacherCollator.encode

    def recorded(collator, prompt, context):
        if threading.current_thread() is threading.main_thread():
            by_main.append(context.template)
        return encode(collator, prompt, context)

    monkeypatch.setattr(TeacherCollator, "encode", recorded)
    rows = [{**row, "hint": f"carry {place}", "solution": "7\n\n8\n\n9"} for place, row in enumerate(dataset)]
    trainer = make_trainer(
        make_model,
        make_args,
        Dataset.from_list(rows),
        tokenizer,
        trainer_class=PurifiedOPSDTrainer,
        prompt_template="Q: {prompt}",
        teacher_prompt_template="{prompt} {hint}\n{solution}",
        shown_solution="1.0..0.3 in 4",
        decomposition_steps=0,
    )
    trainer.state.global_step = 2
    by_main.clear()
    batch = trainer.targets.prepare(rows[:4], "train", trainer._moment())
    trainer.targets.sampled(batch, [[5, 6]] * 4, {2})
    trainer.targets.read(batch, 1, trainer._moment())
    encoded = [
        trainer.scorer.encode((own["prompt"], given)[view.template != "plain"], view, "")
        for own, given, views in zip(batch.rows, batch.prompts, batch.contexts, strict=True)
        for view in views
    ]
    assert len(encoded) == 12 and by_main == []
    student, teacher = (tokenizer.decode(context.ids) for context in encoded[3:5])
    assert "Q:" in student and "Q:" not in teacher
    assert "8" in teacher.split("carry 1")[1] and "9" not in teacher.split("carry 1")[1]  # two of three steps
