# SPDX-License-Identifier: Apache-2.0
"""SSOPD: who teaches whom, the weight of a group, the step by hand beside GRPO, and OPSD as its special case."""

import pytest
import torch
from groups import ids_of
from pages import (
    MOMENT,
    assert_same_step,
    gradients_of,
    grpo_by_hand,
    moved,
    raw_logits,
    student_of,
    whole_step,
)

from trl_opsd import OPSDTrainer
from trl_opsd.experimental.ssopd.method import SSOPD, contrast_contexts, contrast_loss, frontier_marks
from trl_opsd.experimental.ssopd.trainer import SSOPDConfig, SSOPDTrainer
from trl_opsd.losses import frontier_weight
from trl_opsd.methods.base import RowFacts
from trl_opsd.teacher.contexts import Rollout

# Group 0: one right of four; group 1: two right of four.
TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a", "it is \\boxed{10} then", "no", "so it is 5", "\\boxed{6}")
SMALL = {"max_completion_length": 40, "num_generations": 4, "per_device_train_batch_size": 8}
ROUNDED = {"rel": 1e-5, "abs": 1e-7}  # TRL's advantages are float32
LENGTH = 6


@pytest.fixture
def build(build_group):
    def build(trainer_class=SSOPDTrainer, texts=TEXTS, **settings):
        return build_group(
            trainer_class, texts, **{**SMALL, "temperature": 1.3, "distillation_length": LENGTH, **settings}
        )

    return build


def groups_of(rows):
    return [rows[index] for index in (0, 5) for _ in range(4)]


def term_by_hand(trainer, model, teacher_model, row, right, wrong):
    """Mean over the first tokens of a wrong text of the clipped KL(teacher || student); the teacher reads a right text."""
    args = trainer.args
    completion = [*trainer.tokenizer(wrong, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id][
        :LENGTH
    ]
    student = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
    text = args.teacher_prompt_template.replace("{prompt}", row["prompt"][-1]["content"]).replace("{solution}", right)
    teacher = ids_of(trainer, [{"role": "user", "content": text}], **args.teacher_chat_template_kwargs)
    log_q = (raw_logits(model, student, completion) / args.temperature).log_softmax(-1)
    log_p = (raw_logits(teacher_model, teacher, completion).detach() / args.temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).clamp(max=0.05).sum(-1).mean()


def assert_near(got, value, surrogate, term, model):
    """`got` is GRPO's value plus a term, with the gradient of both."""
    (surrogate + term).backward()
    wanted = value.item() + term.item()
    assert got[0] == pytest.approx(wanted, **ROUNDED)
    assert_same_step((wanted, got[1]), (wanted, gradients_of(model)))


def test_a_step_is_grpos_plus_the_weighted_term_of_each_group(build, dataset):
    trainer = build(frontier_strength=2.0)
    first = student_of(trainer)
    moved(trainer)
    rows, model = groups_of(dataset), student_of(trainer)
    got = whole_step(trainer, rows)
    value, surrogate = grpo_by_hand(trainer, model, rows)
    # Shares of right rollouts are 1/4 and 1/2: weights .75 and 1. "\\boxed{6}" is the shorter right one.
    one = term_by_hand(trainer, model, first, rows[0], "so \\boxed{3}", "wait, 10 it is")
    two = term_by_hand(trainer, model, first, rows[4], "\\boxed{6}", "so it is 5")
    assert_near(got, value, surrogate, 2.0 * (0.75 * one + 1.0 * two) / 2, model)
    mask = trainer._buffered_inputs[0]["distillation_mask"]
    order = trainer._buffered_inputs[0]["rollout_index"].tolist()
    assert sorted(order[row] for row in mask.any(dim=1).nonzero().flatten()) == [2, 6]
    assert mask.sum() == 2 * LENGTH  # the first K positions alone
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rows/")}
    assert logged == {"rows/used": 0.25, "rows/not_longest_wrong": 0.75}


def test_two_micro_batches_of_four_are_one_of_eight(build, dataset):
    steps = []
    for settings in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}):
        trainer = build(frontier_strength=2.0, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, groups_of(dataset)))
    assert_same_step(steps[1], steps[0])


@pytest.mark.parametrize(
    "texts", [("a", "no", "5", "wait, 10 it is"), ("\\boxed{6}", "so \\boxed{3}", "\\boxed{1}", "\\boxed{2} a")]
)
def test_groups_that_are_all_right_or_all_wrong_are_left_to_grpo(build, dataset, texts):
    trainer = build(texts=texts)
    moved(trainer)
    loss, gradients = whole_step(trainer, groups_of(dataset))
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())  # GRPO's own is 0 there
    assert trainer._metrics["train"]["rows/group_not_mixed"] == [1.0]


def test_the_term_alone_on_a_balanced_group_with_the_solution_in_place_of_the_right_rollout_is_opsd(
    build, dataset, monkeypatch
):
    rows = [dataset[5]] * 4
    texts = (dataset[5]["solution"], "wait, 10 it is", dataset[5]["solution"] + " or so", "a")
    shared = {"per_device_train_batch_size": 4, "reward_weight": 0.0}
    trainer = build(texts=texts, frontier_strength=1.0, **shared)
    moved(trainer)
    got = whole_step(trainer, rows)
    settings = {"num_generations": 1, "per_device_train_batch_size": 1, "max_grad_norm": 0.1}
    other = build(OPSDTrainer, ("wait, 10 it is",), **settings, teacher_chat_template_kwargs={"enable_thinking": False})
    moved(other)
    assert_same_step(got, whole_step(other, rows[:1]))


def rollouts(*pairs):
    """Of (reward, length)."""
    return [Rollout("x", None, f"y{index}", reward, length) for index, (reward, length) in enumerate(pairs)]


SETTINGS = type("Settings", (), {"reward_threshold": 0.5, "frontier_strength": 0.5})


def test_the_shortest_right_rollout_teaches_the_longest_wrong_one_and_ties_go_to_the_first():
    group = rollouts((1, 9), (0, 4), (1, 7), (1, 7), (0, 8), (0, 8), (None, 99))
    contexts = contrast_contexts(group, SETTINGS, MOMENT)
    assert [bool(views) for views in contexts] == [False] * 4 + [True] + [False] * 2
    assert contexts[4][0].slot == "y2"
    order = [6, 2, 4, 0, 3, 5, 1]  # another order, in which the firsts of the ties are the same
    again = contrast_contexts([group[index] for index in order], SETTINGS, MOMENT)
    assert [contexts[index] for index in order] == again


def test_the_weight_is_that_of_the_groups_balance():
    assert [frontier_weight(share) for share in (0, 1 / 8, 1 / 2, 1)] == [0, 0.4375, 1, 0]
    marks = frontier_marks(rollouts((1, 1), *[(0, 1)] * 7), SETTINGS, MOMENT)
    assert marks == [8 * 0.4375] * 8
    assert frontier_marks(rollouts((None, 1), (None, 2)), SETTINGS, MOMENT) == [0.0, 0.0]


def test_the_gradient_is_in_one_row_and_in_its_first_positions():
    divergence = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[0.0] * 5, [1, 1, 1, 0, 0], [0] * 5])
    nothing = torch.zeros_like(divergence)
    given = {"mask": mask, "mark": torch.full_like(mask, 3.0)}
    facts = RowFacts(nothing, nothing, nothing, nothing, divergence, divergence, given)
    loss = contrast_loss(facts, SETTINGS, MOMENT)
    (gradient,) = torch.autograd.grad(loss.sum(), divergence)
    assert torch.equal(gradient, 0.5 * 3.0 * mask / 3) and loss.shape == (3,)


@pytest.mark.parametrize(
    "bad", [{"frontier_strength": -0.1}, {"num_generations": 1}], ids=lambda value: next(iter(value))
)
def test_bad_settings_are_refused_by_name(make_args, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_args(SSOPDConfig, **{**SMALL, **bad})


def test_the_papers_numbers_are_the_defaults():
    args = SSOPDConfig("out", bf16=False, use_cpu=True)
    # arXiv 2605.17497 as noted: lambda_0 .5, frozen teacher, forward KL with a clip of each term, beside GRPO.
    assert (args.frontier_strength, args.teacher_model_kind, args.divergence) == (0.5, "base", "forward_kl")
    assert (args.clip, args.clip_value, args.distillation_length, args.reward_weight) == ("upper", 0.05, 1024, 1.0)
    assert SSOPD.inferred
