# SPDX-License-Identifier: Apache-2.0
"""Rewards, rollouts and rows that are not as they should be: each is refused by name, or has a stated effect."""

import copy
import math
import warnings

import groups
import pytest
from datasets import Dataset

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.demo.tokenizer import build_tokenizer


@pytest.fixture
def build(build_group):
    return build_group


TRAINERS = [OPSDTrainer, OGLSSDTrainer, PurifiedOPSDTrainer]
GROUP = {"num_generations": 4, "per_device_train_batch_size": 4, "steering_warmup_steps": 0}


def one_group(dataset, **columns):
    return [{**dataset[0], **columns}] * 4


def distilled_rows(batch):
    kept = batch["distillation_mask"].any(1).tolist()
    return sorted(row for row, keep in zip(batch["rollout_index"].tolist(), kept, strict=True) if keep)


def test_rewards_that_never_differ_warn_once_and_say_how_many_groups_were_what(build):
    trainer = build(**GROUP, reward=lambda completions, **kwargs: [1.0] * len(completions), max_steps=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    (told,) = [str(w.message) for w in caught if "split no group" in str(w.message)]
    assert "in 10 generation batches: {'all_right': 10}" in told and "reward_funcs and reward_threshold" in told


@pytest.mark.parametrize("nothing", [None, math.nan], ids=["None", "NaN"])
def test_a_rollout_without_a_reward_is_neither_right_nor_wrong_and_is_counted(build, dataset, nothing):
    trainer = build(**GROUP, reward=lambda completions, **kwargs: [1.0, nothing, 0.0, nothing])
    _, batch = groups.step(trainer, one_group(dataset))
    metrics = trainer._metrics["train"]
    assert distilled_rows(batch) == [2] and metrics["groups/mixed"] == [1.0] and metrics["rewards/missing"] == [0.5]


def test_one_function_without_a_reward_leaves_the_row_to_the_others(build, dataset):
    def first(completions, **kwargs):
        return [1.0, None, None, 0.0]

    def second(completions, **kwargs):
        return [0.0, 1.0, None, 0.0]

    trainer = build(**GROUP, reward=[first, second])
    _, batch = groups.step(trainer, one_group(dataset))
    assert distilled_rows(batch) == [3] and trainer._metrics["train"]["rewards/missing"] == [0.25]


def test_rewards_that_are_all_none_train_on_nothing_and_say_so(build, dataset):
    trainer = build(**GROUP, reward=lambda completions, **kwargs: [None] * len(completions))
    loss, batch = groups.step(trainer, one_group(dataset))
    loss.backward()
    metrics = trainer._metrics["train"]
    assert loss.item() == 0 and not distilled_rows(batch)
    assert metrics["groups/unscored"] == [1.0] and metrics["rewards/missing"] == [1.0]


@pytest.mark.parametrize("size", [3, 5, 0])
def test_a_wrong_number_of_rewards_is_refused_with_the_functions_name(build, dataset, size):
    def miscounted(completions, **kwargs):
        return [1.0] * size

    with pytest.raises(ValueError, match=rf"'miscounted' returned {size} rewards, but 4"):
        groups.step(build(**GROUP, reward=miscounted), one_group(dataset))


def test_an_error_of_a_reward_function_stops_the_run_as_it_is(build):
    def broken(completions, **kwargs):
        return [1 / 0]

    with pytest.raises(ZeroDivisionError) as raised:
        build(**GROUP, reward=broken).train()
    assert any(entry.name == "broken" for entry in raised.traceback)


def slots_read(trainer, dataset, monkeypatch, **columns):
    """Token ids of every privileged context of one step."""
    encode, read = trainer.scorer.collator.encode, []

    def record(prompt, context):
        encoded = encode(prompt, context)
        read.extend([(context, encoded)] if context.template != "plain" else [])
        return encoded

    monkeypatch.setattr(trainer.scorer.collator, "encode", record)
    loss, _ = groups.step(trainer, one_group(dataset, **columns))
    assert loss.isfinite()
    return read


def test_an_inserted_rollout_over_its_budget_is_shortened_and_counted(build, dataset, monkeypatch):
    trainer = build(**GROUP, max_rollout_context_length=3)
    read = slots_read(trainer, dataset, monkeypatch, solution=None)
    whole = {context.slot: encoded.shortened for context, encoded in read}
    assert whole["1+2=3"] and whole["it is \\boxed{10} then"]
    free = build(**GROUP)
    full = slots_read(free, dataset, monkeypatch, solution=None)
    assert max(len(encoded.ids) for _, encoded in read) < max(len(encoded.ids) for _, encoded in full)
    assert trainer._metrics["train"]["teacher/solution_shortened"] == [0.5]  # the two wrong ones read them
    assert free._metrics["train"]["teacher/solution_shortened"] == [0.0]


def test_a_prompt_over_its_budget_because_of_an_inserted_rollout_keeps_the_template_and_fits(
    build, dataset, monkeypatch
):
    texts = ("\\boxed{" + "1+" * 60 + "1}", "no", "a", "5")
    free = build(**GROUP, texts=texts, max_completion_length=200)
    lengths = {c.slot: len(e.ids) for c, e in slots_read(free, dataset, monkeypatch, solution=None)}
    limit = max(lengths.values()) - 40
    trainer = build(**GROUP, texts=texts, max_completion_length=200, max_teacher_prompt_length=limit)
    read = slots_read(trainer, dataset, monkeypatch, solution=None)
    shortened = [encoded for _, encoded in read if encoded.shortened]
    assert len(shortened) == 1 and limit - 8 < len(shortened[0].ids) <= limit
    text = trainer.tokenizer.decode(shortened[0].ids)
    before, after = trainer.args.teacher_prompt_template.split("{prompt}")[1].split("{solution}")
    assert before in text and after in text and " [...] " in text
    assert trainer._metrics["train"]["teacher/solution_shortened"] == [0.75]  # each of the three wrong ones reads it


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_conversations_need_a_chat_template_and_plain_prompts_do_not(
    make_model, make_args, dataset, trainer_class, given_rollouts
):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    plain = Dataset.from_list([{"prompt": f"{i}+1=", "solution": f"\\boxed{{{i + 1}}}"} for i in range(8)])
    settings = {"num_generations": 4, "per_device_train_batch_size": 8}
    if trainer_class is OGLSSDTrainer:
        settings |= groups.SMALL

    def make(rows):
        return trainer_class(
            model=make_model(),
            reward_funcs=lambda completions, **kwargs: [1.0, 0.0] * (len(completions) // 2),
            args=make_args(trainer_class.config_class, **settings),
            train_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
        )

    with pytest.raises(ValueError, match="tokenizer has a chat template"):
        make(dataset)
    trainer = given_rollouts(make(plain))
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 0


@pytest.mark.parametrize("missing", ["column", None, "", " \n"])
def test_ogls_sd_goes_on_without_a_solution_and_the_others_refuse_the_row(
    build, dataset, missing, make_model, make_args, tokenizer
):
    rows = dataset.remove_columns("solution") if missing == "column" else None
    if rows is None:
        rows = Dataset.from_list(
            [{**row, "solution": missing if i == 5 else row["solution"]} for i, row in enumerate(dataset)]
        )
    trainer = build(**GROUP, rows=rows, clip=None)
    losses = []
    for solution in ({} if missing == "column" else {"solution": missing}, {"solution": None}):
        loss, batch = groups.step(trainer, [{"prompt": dataset[5]["prompt"], **solution}] * 4)
        losses.append(loss.item())
        assert distilled_rows(batch) == [0, 2]
    assert losses[0] == pytest.approx(losses[1], **groups.EXACT) and losses[0] > 0
    told = "no `solution` column" if missing == "column" else "train_dataset row 5: `solution` is"
    for trainer_class in (OPSDTrainer, PurifiedOPSDTrainer):
        with pytest.raises(ValueError, match=told):
            trainer_class(
                model=make_model(),
                args=make_args(trainer_class.config_class),
                train_dataset=rows,
                processing_class=copy.deepcopy(tokenizer),
            )


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_an_empty_completion_is_distilled_at_its_end_token_alone(build, dataset, trainer_class):
    texts = ("", "so \\boxed{3}", "wait", "no")
    settings = GROUP if trainer_class is OGLSSDTrainer else {k: v for k, v in GROUP.items() if "steering" not in k}
    trainer = build(trainer_class, **settings, texts=texts)
    loss, batch = groups.step(trainer, one_group(dataset))
    loss.backward()
    row = batch["rollout_index"].tolist().index(0)
    assert batch["distillation_mask"][row].sum() == 1 and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_rollout_that_trl_masks_whole_is_left_out(build, dataset, trainer_class):
    texts = ("wait, 10 it is and on and on", "\\boxed{3}", "no", "a")
    settings = GROUP if trainer_class is OGLSSDTrainer else {k: v for k, v in GROUP.items() if "steering" not in k}
    settings |= {"max_completion_length": 8, "mask_truncated_completions": True}
    trainer = build(trainer_class, **settings, texts=texts)
    loss, batch = groups.step(trainer, one_group(dataset))
    loss.backward()
    wanted = [2, 3] if trainer_class is OGLSSDTrainer else [1, 2, 3]
    assert distilled_rows(batch) == wanted and loss.isfinite() and loss.item() != 0
