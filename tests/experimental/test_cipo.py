# SPDX-License-Identifier: Apache-2.0
"""Correction prompts: GRPO bit for bit without a share, whose attempt a prompt shows, its age, what is skipped, exact resume."""

import copy
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import OPSDTrainer, RLSDTrainer
from trl_opsd.demo.tokenizer import build_tokenizer
from trl_opsd.experimental.cipo import CorrectionSettings, with_corrections
from trl_opsd.experimental.cipo.attempts import AttemptReader
from trl_opsd.experimental.cipo.queue import Attempt, CorrectionQueue
from trl_opsd.experimental.cipo.trainer import STATE_FILE

pytestmark = pytest.mark.filterwarnings("ignore:Correction prompts are experimental")
RUN = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "max_completion_length": 16,
    "chat_template_kwargs": {"enable_thinking": False},
}
ALL = {"correction_share": 1.0, "right_attempt_share": 0.0}


def reward_by_length(completions, **columns):
    return [float(len(completion[0]["content"]) % 3 == 0) for completion in completions]


@pytest.fixture
def make(make_model, make_args, dataset, tokenizer):
    """A function that makes a trainer, TRL's own where none is named."""

    def make(trainer_class=GRPOTrainer, reward=reward_by_length, rows=None, **settings):
        config_class = getattr(trainer_class, "config_class", GRPOConfig)
        return trainer_class(
            model=make_model(torch.float64),
            reward_funcs=reward,
            args=make_args(config_class, **{**RUN, **settings}),
            train_dataset=dataset if rows is None else rows,
            processing_class=copy.deepcopy(tokenizer),
        )

    return make


def steps(trainer):
    """What each step logged but seconds, and the weights at the end."""
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = [{name: value for name, value in entry.items() if "time" not in name} for entry in entries]
    return kept, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def batches_of(trainer):
    """Lists that gain the rows of every generation batch before and after they were replaced, and the queue's length then."""
    seen, replace_rows = [], trainer.replace_rows

    def replaced(rows):
        waiting = list(trainer.queue.attempts)
        got = replace_rows(rows)
        seen.append((rows, got, waiting))
        return got

    trainer.replace_rows = replaced
    return seen


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLSDTrainer], ids=lambda c: c.__name__)
def test_a_share_of_0_is_the_trainer_itself_bit_for_bit(make, trainer_class):
    want, weights = steps(make(trainer_class))
    got, own = steps(make(with_corrections(trainer_class, correction_share=0.0)))
    assert got == want and len(got) == 4
    assert torch.equal(own, weights)
    _, other = steps(make(with_corrections(trainer_class, correction_share=0.5)))
    assert not torch.equal(other, weights)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLSDTrainer, OPSDTrainer], ids=lambda c: c.__name__)
def test_an_attempt_meets_its_own_question_and_all_rows_of_a_group_are_alike(make, trainer_class):
    alone = {"num_generations": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    corrected = with_corrections(trainer_class, correction_share=0.6, strip_thinking=False)
    trainer = make(corrected, **(alone if trainer_class is OPSDTrainer else {}))
    seen, sampled = batches_of(trainer), {}
    after = trainer.after_rewards

    def noted(completion_ids, rewards):
        for row, ids in zip(seen[-1][1], completion_ids, strict=True):
            text = trainer.attempts.tokenizer.decode(ids, skip_special_tokens=True).strip()
            sampled.setdefault(row["prompt"][-1]["content"], set()).add(text)
        after(completion_ids, rewards)

    trainer.after_rewards = noted
    trainer.train()
    shown = 0
    for before, got, _ in seen:
        for start in range(0, len(got), trainer.num_generations):
            group = got[start : start + trainer.num_generations]
            assert all(row == group[0] for row in group)
            if group[0] in before:
                continue
            shown += 1
            prompt = group[0]["prompt"][-1]["content"]
            question, _, rest = prompt.partition("\n\nAn earlier attempt")
            attempt = rest.split("=== Attempt begins ===\n")[1].split("\n=== Attempt ends ===")[0]
            assert attempt in sampled[question]
            source = next(row for row in trainer.train_dataset if row["prompt"][-1]["content"] == question)
            assert {**source, "prompt": None} == {**group[0], "prompt": None}
    assert shown >= 3


def attempts(*kinds, batch=0, mixed=True):
    return [Attempt({"prompt": f"q{n}"}, f"a{n}", kind, mixed, batch) for n, kind in enumerate(kinds)]


@pytest.mark.parametrize("age", [1, 3])
def test_an_attempt_is_shown_within_the_age_limit_and_once(age):
    for wait in range(1, age + 2):
        queue = CorrectionQueue(CorrectionSettings(**ALL, max_attempt_age=age), seed=0)
        queue.draw(0)
        queue.add(attempts(False, batch=queue.batch))
        for _ in range(wait - 1):
            queue.draw(0)
        assert len(queue.draw(2)) == (1 if wait <= age else 0)
        assert queue.draw(2) == {}


def test_runs_show_attempts_of_the_batch_before_alone(make):
    trainer = make(with_corrections(GRPOTrainer, correction_share=0.5))
    seen = batches_of(trainer)
    trainer.train()
    drawn = 0
    for number, (before, got, waiting) in enumerate(seen, 1):
        texts = [row["prompt"][-1]["content"] for row, own in zip(got, before, strict=True) if row is not own]
        for text in texts:
            ages = [number - each.batch for each in waiting if f"begins ===\n{each.text}\n" in text]
            assert 1 in ages
        drawn += len(texts)
    assert drawn >= 4


def test_the_share_of_groups_holds_over_batches_of_few_groups():
    queue, shown, right = CorrectionQueue(CorrectionSettings(correction_share=0.3), seed=1), 0, 0
    for _ in range(400):
        drawn = queue.draw(2)
        shown, right = shown + len(drawn), right + sum(attempt.is_right for attempt in drawn.values())
        queue.add(attempts(*[False, True] * 4, batch=queue.batch))
    assert shown / 800 == pytest.approx(0.3, abs=0.04)
    assert right / shown == pytest.approx(0.25, abs=0.06)


def test_a_kind_that_does_not_wait_leaves_its_group_plain_and_mixed_groups_come_first():
    queue = CorrectionQueue(CorrectionSettings(correction_share=1.0, right_attempt_share=1.0), seed=0)
    queue.add(attempts(False, False))
    assert queue.draw(2) == {} and len(queue.attempts) == 2
    queue = CorrectionQueue(CorrectionSettings(**ALL), seed=0)
    queue.add([*attempts(False, False, mixed=False), *attempts(False, False, True)])
    assert [attempt.is_mixed for attempt in queue.draw(3).values()].count(True) == 2


def test_draws_follow_from_the_seed_and_the_saved_state_alone():
    def run(queue, count):
        random.seed(count)
        drawn = []
        for _ in range(count):
            drawn.append(queue.draw(4))
            queue.add(attempts(False, True, False, batch=queue.batch))
        return drawn

    queue = CorrectionQueue(CorrectionSettings(max_attempt_age=2), seed=5)
    run(queue, 3)
    state = json.loads(json.dumps(queue.state()))
    again = CorrectionQueue(queue.settings, seed=5)
    again.restore(state)
    want = run(queue, 5)
    assert run(again, 5) == want and any(want)
    other = CorrectionQueue(queue.settings, seed=6)
    other.restore(state)
    assert run(other, 5) != want


def read(texts, rewards, longest=None, **settings):
    reader = AttemptReader(CorrectionSettings(**settings), build_tokenizer(), longest, None, {})
    counts = Counter()
    row = {"prompt": [{"role": "user", "content": "1+1=?"}]}
    return reader, reader.attempts(row, texts, rewards, 3, 0, counts), counts


def test_one_attempt_of_each_kind_waits_and_what_is_skipped_is_counted():
    _, found, counts = read(["a", "b", "c", "d"], [0.0, 1.0, None, 0.0])
    assert [(each.is_right, each.is_mixed, each.batch) for each in found] == [(False, True, 3), (True, True, 3)]
    assert found[0].text in "ad" and found[1].text == "b"
    assert counts == {"unrewarded": 1}
    _, found, counts = read(["a", "b"], [0.0, 0.0])
    assert [(each.is_right, each.is_mixed) for each in found] == [(False, False)]
    _, found, counts = read(["a", "b"], [1.0, 1.0], right_attempt_share=0.0)
    assert found == []


def test_thinking_control_tokens_and_blank_attempts_are_not_shown():
    _, found, counts = read(["<think>x</think> it is 3<|im_end|> now"], [0.0])
    assert found[0].text == "it is 3 now"
    _, found, counts = read(["<think>x</think>  ", "", "<|im_end|>"], [0.0] * 3)
    assert found == [] and counts["empty"] == 3


def test_an_attempt_that_makes_the_prompt_too_long_is_skipped_and_a_shorter_one_shown():
    reader, found, _ = read(["1"], [0.0])
    prompt = reader.prompt({"prompt": [{"role": "user", "content": "1+1=?"}]}, "1")
    exact = len(reader.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    assert len(read(["1"], [0.0], longest=exact)[1]) == 1
    _, found, counts = read(["1"], [0.0], longest=exact - 1)
    assert found == [] and counts["long"] == 1
    _, found, _ = read(["1" * 50, "2", "3" * 50], [0.0] * 3, longest=exact)
    assert found[0].text == "2"


def test_a_wrong_answer_to_a_right_attempt_costs_the_penalty_and_nothing_else_does(make):
    trainer = make(with_corrections(GRPOTrainer, correction_share=1.0, right_attempt_share=1.0, broken_penalty=0.7))
    trainer.model.train()
    trainer._own_rows = [dict(trainer.train_dataset[n]) for n in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)]
    trainer._drawn = {0: attempts(True)[0], 2: attempts(False)[0]}
    rewards = torch.tensor([[1.0], [0.0], [float("nan")], [0.4], *[[0.0]] * 4, *[[0.0]] * 4])
    trainer.after_rewards([trainer.attempts.tokenizer("so 4")["input_ids"]] * 12, rewards)
    want = [[1.0], [-0.7], [float("nan")], [-0.3], *[[0.0]] * 8]
    torch.testing.assert_close(rewards, torch.tensor(want), equal_nan=True)
    metrics = trainer._metrics["train"]
    assert metrics["corrections/reward_right"] == [pytest.approx(1.4 / 3)] and metrics["corrections/reward_plain"] == [
        0
    ]
    assert [each.row["prompt"] for each in trainer.queue.attempts] == [trainer._own_rows[4]["prompt"]]


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLSDTrainer], ids=lambda c: c.__name__)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make, tmp_path, trainer_class):
    corrected = with_corrections(trainer_class, correction_share=0.7, max_attempt_age=2)
    saving = {"save_strategy": "steps", "save_steps": 2}
    want, weights = steps(make(corrected, **saving))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / STATE_FILE).read_text())["attempts"]
    trainer = make(corrected, **saving)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    got = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert any(entry["corrections/share"] for entry in want[2:])
    for own, other in zip(got[2:], want[2:], strict=True):
        assert {name: own[name] for name in other} == other
    assert torch.equal(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), weights)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_shows_what_was_drawn_for_its_own_groups(make, dataset, monkeypatch, rank):
    """Two ranks hold four groups of four; the second and the third show an attempt."""
    trainer = make(with_corrections(GRPOTrainer, **ALL))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 2))
    monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda _: rank))
    drawn = {group: Attempt(dataset[group + 4], f"attempt {group}", False, True, 1) for group in (1, 2)}
    asked = []
    monkeypatch.setattr(trainer.queue, "draw", lambda num_groups: asked.append(num_groups) or drawn)
    trainer.model.train()
    rows = [dataset[2 * rank + place // 4] for place in range(8)]
    got = [row["prompt"][-1]["content"] for row in trainer.replace_rows(rows)]
    plain, shown = (slice(0, 4), slice(4, 8)) if rank == 0 else (slice(4, 8), slice(0, 4))
    assert asked == [4] and got[plain] == [row["prompt"][-1]["content"] for row in rows[plain]]
    assert len(set(got[shown])) == 1 and f"attempt {rank + 1}" in got[shown][0]


def test_what_a_run_shows_is_logged(make):
    entries, _ = steps(make(with_corrections(GRPOTrainer, correction_share=0.5)))
    names = {"share", "right", "queue", "reward_plain", "skipped_unrewarded", "skipped_empty", "skipped_long"}
    assert all(f"corrections/{name}" in entries[0] for name in names)
    assert entries[0]["corrections/share"] == 0 and entries[0]["corrections/queue"] > 0


def test_evaluation_shows_no_attempt(make, dataset):
    trainer = make(with_corrections(GRPOTrainer, correction_share=1.0))
    trainer.queue.add(attempts(False, batch=0))
    trainer.model.eval()
    rows = [dict(dataset[0])] * 4
    assert trainer.replace_rows(rows) is rows and trainer.queue.batch == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"correction_share": 1.1},
        {"correction_share": -0.1},
        {"right_attempt_share": 2},
        {"max_attempt_age": 0},
        {"max_attempt_age": 1.5},
        {"max_correction_prompt_length": 0},
        {"broken_penalty": -1.0},
        {"reward_threshold": float("nan")},
        {"correction_template": "{prompt}"},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        with_corrections(GRPOTrainer, **bad)


def test_what_cannot_be_shown_again_is_refused_before_the_first_step(make, dataset):
    corrected = with_corrections(GRPOTrainer)
    with pytest.raises(ValueError, match=r"broken_penalty=1\.0 with 2 reward functions"):
        make(corrected, reward=[reward_by_length, reward_by_length])
    make(with_corrections(GRPOTrainer, broken_penalty=0.0), reward=[reward_by_length, reward_by_length])
    rows = Dataset.from_list([{**row, "picture": b"\x00"} for row in dataset])
    with pytest.raises(ValueError, match="column `picture` holds a bytes"):
        make(corrected, rows=rows)
    with pytest.raises(ValueError, match="tools is set"):
        corrected(model=None, tools=[len])


def test_the_defaults_are_the_reading_and_what_is_inferred_is_said(make):
    own = CorrectionSettings()
    assert (own.correction_share, own.right_attempt_share, own.broken_penalty, own.max_attempt_age) == (
        0.5,
        0.25,
        1.0,
        1,
    )
    with pytest.warns(UserWarning, match="abstract and summaries"):
        make(with_corrections(GRPOTrainer))
    assert replace(own, correction_share=0.0).correction_share == 0
