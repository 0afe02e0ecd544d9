# SPDX-License-Identifier: Apache-2.0
"""SORT: references stand beside all-wrong groups alone; the step by hand, with GRPO's part from its definition."""

import pytest
import torch
from datasets import Dataset
from groups import ids_of, reward_boxed
from pages import (
    MOMENT,
    assert_same_step,
    gradients_of,
    grpo_by_hand,
    moved,
    raw_logits,
    student_of,
    token_log_probs,
    whole_step,
)

from trl_opsd.experimental.sort.method import references, repair_loss
from trl_opsd.experimental.sort.trainer import SORTConfig, SORTTrainer
from trl_opsd.methods.base import RowFacts
from trl_opsd.teacher.contexts import Rollout

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a", "b", "no", "5", "it is 6 then")  # one right, then none
SMALL = {"max_completion_length": 40, "num_generations": 4, "per_device_train_batch_size": 8}
HEAT = 1.3
ROUNDED = {"rel": 1e-5, "abs": 1e-7}  # TRL's advantages are float32


@pytest.fixture
def rows(dataset):
    return Dataset.from_list([{**row, "plan": f"add {index} numbers"} for index, row in enumerate(dataset)])


@pytest.fixture
def build(build_group, rows):
    def build(texts=TEXTS, **settings):
        return build_group(SORTTrainer, texts, rows, **{**SMALL, "temperature": HEAT, **settings})

    return build


def groups_of(rows):
    return [rows[index] for index in (0, 5) for _ in range(4)]


def assert_near(got, wanted):
    assert got[0] == pytest.approx(wanted[0], **ROUNDED)
    assert_same_step((wanted[0], got[1]), wanted)


def repair_by_hand(trainer, model, row, share):
    reference = [
        *trainer.tokenizer(row["solution"], add_special_tokens=False)["input_ids"],
        trainer.tokenizer.eos_token_id,
    ]
    reference = reference[: trainer.max_completion_length]
    text = trainer.args.plan_prompt_template.replace("{prompt}", row["prompt"][-1]["content"])
    shown = [{"role": "user", "content": text.replace("{plan}", row["plan"])}]
    contexts = [ids_of(trainer, prompt, **trainer.args.chat_template_kwargs) for prompt in (row["prompt"], shown)]
    own, planned = (token_log_probs(raw_logits(model, context, reference), reference, HEAT) for context in contexts)
    weight = (own.exp() ** (1 - share) * planned.exp() ** share).detach()
    return -(weight * own).mean()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_step_is_grpos_plus_the_weighted_solution_of_the_group_that_is_all_wrong(build, rows, share):
    trainer = build(repair_weight=0.7, plan_share=share)
    moved(trainer)
    chosen, model = groups_of(rows), student_of(trainer)
    got = whole_step(trainer, chosen)
    value, surrogate = grpo_by_hand(trainer, model, chosen)
    repair = 0.7 * repair_by_hand(trainer, model, chosen[4], share)
    (surrogate + repair).backward()
    assert_near(got, (value.item() + repair.item(), gradients_of(model)))
    assert repair.item() > 1e-3
    (batch,) = trainer._buffered_inputs
    assert batch["extra_mask"].any(1).sum() == batch["num_loss_rows"] == 1


def test_two_micro_batches_of_four_are_one_of_eight(build, rows):
    steps = []
    for settings in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}):
        trainer = build(repair_weight=0.7, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, groups_of(rows)))
    assert_same_step(steps[1], steps[0])


@pytest.mark.parametrize("settings", [{"texts": TEXTS[:4]}, {"repair_weight": 0.0}], ids=["one right each", "weight 0"])
def test_with_a_right_rollout_in_each_group_or_without_weight_it_is_grpo(build, rows, settings):
    trainer = build(**settings)
    moved(trainer)
    chosen, model = groups_of(rows), student_of(trainer)
    value, surrogate = grpo_by_hand(trainer, model, chosen)
    surrogate.backward()
    assert_near(whole_step(trainer, chosen), (value.item(), gradients_of(model)))


def extras_of(rewards, solution="s", plan="p"):
    group = [Rollout("x", solution, "y", reward, columns={"plan": plan}) for reward in rewards]
    return references(group, SORTSettings, MOMENT)


class SORTSettings:
    reward_threshold, repair_weight, plan_share = 0.5, 0.2, 0.5


def test_the_first_rollout_of_a_group_that_is_all_wrong_gets_the_reference():
    first, *others = extras_of([0.0, 0.0, 0.0])
    assert first.sequence == "s" and first.contexts[0].texts == (("plan", "p"),) and others == [None, None]
    for extras in (
        extras_of([0.0, 1.0]),
        extras_of([0.0, None]),
        extras_of([0.0, 0.0], solution=None),
        extras_of([0.0, 0.0], plan=" "),
    ):
        assert extras == [None, None]


def facts_of(logits, tokens, planned):
    log_prob = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    nothing = torch.zeros_like(log_prob)
    given = {"mask": torch.ones_like(log_prob), "view_log_probs": planned(log_prob.detach())[None]}
    extra = RowFacts(log_prob, None, nothing, None, None, None, given)
    return RowFacts(nothing, None, nothing, None, None, None, {}, extra)


def test_where_the_plan_explains_nothing_every_share_is_probability_weighted_learning_with_its_gradient():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[0, 5, 2], [6, 1, 1]])
    gradients = []
    for share in (0.0, 0.3, 1.0):
        settings = type("Settings", (SORTSettings,), {"plan_share": share})
        loss = repair_loss(facts_of(logits, tokens, lambda own: own), settings, MOMENT).sum()
        gradients.append(torch.autograd.grad(loss, logits)[0])
    q = logits.detach().softmax(-1)
    hit = torch.nn.functional.one_hot(tokens, 7)
    weight = q.gather(-1, tokens.unsqueeze(-1))
    wanted = -0.2 * weight * (hit - q) / 3
    assert all(torch.allclose(gradient, wanted, atol=1e-15) for gradient in gradients)


def test_a_run_logs_and_moves(build):
    trainer = build(learning_rate=0.05, max_steps=2, reward=reward_boxed)
    trainer.train()
    assert trainer.state.log_history[0]["groups/all_wrong"] == 0.5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"repair_weight": -1.0}, "repair_weight=-1.0"),
        ({"plan_share": 2.0}, "plan_share=2.0"),
        ({"plan_prompt_template": "{prompt}"}, "plan_prompt_template does not contain {plan}"),
        ({"num_generations": 1, "reward_weight": 0.0}, "num_generations=1"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(SORTConfig, **{**SMALL, **bad})


def test_a_dataset_without_plans_is_refused_before_training(build_group, dataset):
    with pytest.raises(ValueError, match=r"train_dataset has no column `plan`, which SORT reads"):
        build_group(SORTTrainer, rows=dataset, max_completion_length=40, num_generations=4)
