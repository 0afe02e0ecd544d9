# SPDX-License-Identifier: Apache-2.0
"""StableOPD: a whole step by hand from raw logits, what each weight of 0 leaves, and the reference that is no teacher."""

import math

import pytest
import torch
from groups import EXACT, ids_of, privileged
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
from peft import LoraConfig

from trl_opsd.experimental.stableopd.method import golden_rollouts, held_contexts, held_policy_gradient
from trl_opsd.experimental.stableopd.trainer import StableOPDConfig, StableOPDTrainer
from trl_opsd.methods.base import RowFacts
from trl_opsd.teacher.contexts import Rollout
from trl_opsd.trainers.popd import POPDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.* is experimental")

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
HEAT = 1.2
SMALL = {
    "temperature": HEAT,
    "max_completion_length": 30,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
READ_ROUNDED = {"rel": 1e-6, "abs": 1e-7}  # the read view is kept in float32


@pytest.fixture
def build(build_group):
    def build(trainer_class=StableOPDTrainer, **settings):
        return build_group(trainer_class, TEXTS, **{**SMALL, **settings})

    return build


@pytest.fixture
def rows(dataset):
    return [dataset[index] for index in (0, 0, 5, 5)]


def by_hand(trainer, teacher, first, rows, golden=0.1, reference=0.01):
    """The three parts, each a mean over its tokens, and the loss's gradients: the policy gradient's by its surrogate."""
    model, parts = student_of(trainer), ([], [], [], [])
    for place, (row, ids) in enumerate(zip(rows, trainer._generate_single_turn([None] * 4)[0], strict=True)):
        own = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        shown = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])
        log_q = (raw_logits(model, own, ids) / HEAT).log_softmax(-1)
        log_first = (raw_logits(first, own, ids) / HEAT).log_softmax(-1).detach()
        sampled = log_q.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        ratio = token_log_probs(raw_logits(teacher, shown, ids), ids, HEAT).detach() - sampled.detach()
        parts[0].append(-ratio * sampled)
        parts[1].append((log_q.exp() * (log_q - log_first)).sum(-1))
        if place % 2 == 0:
            text = trainer.tokenizer(row["solution"], add_special_tokens=False)["input_ids"]
            solution = [*text, trainer.tokenizer.eos_token_id][: trainer.max_completion_length]
            parts[2].append(-token_log_probs(raw_logits(model, own, solution), solution, HEAT))
    means = [torch.cat(part).mean() for part in parts[:3]]
    loss = means[0] + reference * means[1] + golden * means[2]
    loss.backward()
    return (loss.item(), gradients_of(model)), [mean.item() for mean in means]


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_a_step_is_its_three_parts_from_raw_logits(build, rows, kind):
    weights = {"golden_weight": 0.7, "reference_weight": 0.3}
    trainer = build(teacher_model_kind=kind, teacher_update_rate=1.0, **weights)
    first = student_of(trainer)
    moved(trainer)
    trainer.teacher.update()
    teacher = first if kind == "base" else student_of(trainer)
    moved(trainer)
    if kind == "live":
        teacher = student_of(trainer)
    wanted, parts = by_hand(trainer, teacher, first, rows, 0.7, 0.3)
    assert_same_step(whole_step(trainer, rows), wanted, **READ_ROUNDED)
    assert min(map(abs, parts)) > 1e-3
    (batch,) = trainer._buffered_inputs
    assert sorted(batch["extra_mask"].any(1).tolist()) == [False, False, True, True]


def test_a_step_with_the_defaults_is_the_re_implementations_weights(build, rows):
    trainer = build()
    first = student_of(trainer)
    moved(trainer)
    wanted, _ = by_hand(trainer, first, first, rows)
    assert_same_step(whole_step(trainer, rows), wanted, **READ_ROUNDED)


def test_without_the_two_weights_it_is_distillation_of_the_sampled_token(build, rows):
    steps = []
    for owner, settings in (
        (StableOPDTrainer, {"golden_weight": 0.0, "reference_weight": 0.0}),
        (POPDTrainer, {"distillation_length": None}),
    ):
        trainer = build(owner, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    assert_same_step(*steps, rel=1e-12)


def test_a_student_at_the_reference_has_a_third_part_of_0(build, rows):
    steps = [whole_step(build(reference_weight=weight), rows) for weight in (0.0, 100.0)]
    assert_same_step(steps[1], steps[0], rel=1e-8, abs=1e-9)


def test_a_teacher_that_reads_what_the_student_reads_has_a_first_part_of_0(build, rows):
    kept = {"teacher_model_kind": "live", "teacher_chat_template_kwargs": {"enable_thinking": False}}
    trainer = build(golden_weight=0.0, reference_weight=0.3, **kept)
    trainer.scorer.collator.templates["teacher"] = "{prompt}"  # shows nothing
    first = student_of(trainer)
    moved(trainer)
    model, parts = student_of(trainer), []
    for row, ids in zip(rows, trainer._generate_single_turn([None] * 4)[0], strict=True):
        own = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        log_q, log_first = ((raw_logits(each, own, ids) / HEAT).log_softmax(-1) for each in (model, first))
        parts.append((log_q.exp() * (log_q - log_first.detach())).sum(-1))
    loss = 0.3 * torch.cat(parts).mean()
    loss.backward()
    assert_same_step(whole_step(trainer, rows), (loss.item(), gradients_of(model)), abs=1e-6)


class Settings:
    epsilon, epsilon_high, delta = 0.2, None, None
    golden_weight, reference_weight = 0.1, 0.0


def enumerated_gradient(logits, log_p):
    """The expected gradient of the page's loss over every token that the student may draw."""
    size, total = len(logits), torch.zeros_like(logits)
    for token in range(size):
        leaf = logits.clone().requires_grad_()
        log_q = leaf.log_softmax(-1)[token].view(1, 1)
        given = {
            "view_log_probs": log_p[token].view(1, 1, 1),
            "old_log_prob": log_q.detach(),
            "engine_weight": torch.ones(1, 1),
        }
        facts = RowFacts(log_q, None, log_q, None, torch.zeros_like(log_q), None, given)
        held_policy_gradient(facts, Settings, MOMENT).sum().backward()
        total += logits.softmax(-1)[token] * leaf.grad
    return total


def test_the_expected_gradient_of_the_first_part_is_that_of_the_reverse_divergence():
    draw = torch.Generator().manual_seed(0)
    logits, log_p = (torch.randn(7, dtype=torch.float64, generator=draw) for _ in range(2))
    log_p = log_p.log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    log_q = leaf.log_softmax(-1)
    (log_q.exp() * (log_q - log_p)).sum().backward()
    torch.testing.assert_close(enumerated_gradient(logits, log_p), leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "u", "kept"), [(1.1, 0.5, 1.1), (1.5, 0.5, 0.0), (1.5, -0.5, 1.5), (0.7, -0.5, 0.0), (0.7, 0.5, 0.7)]
)
def test_the_ratio_to_the_policy_that_sampled_is_under_ppos_clip(ratio, u, kept):
    log_q = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    given = {
        "view_log_probs": (log_q.detach() + u)[None],
        "old_log_prob": log_q.detach() - math.log(ratio),
        "engine_weight": torch.ones(1, 1),
    }
    facts = RowFacts(log_q, None, log_q, None, torch.zeros_like(log_q), None, given)
    (slope,) = torch.autograd.grad(held_policy_gradient(facts, Settings, MOMENT).sum(), log_q)
    assert slope.item() == pytest.approx(-u * kept)


def test_one_solution_joins_a_prompt_and_the_reference_reads_the_bare_prompt():
    group = [Rollout("x", "s", "y")] * 3
    golden, *others = golden_rollouts(group, Settings, MOMENT)
    assert golden.sequence == "s" and golden.contexts == () and others == [None, None]
    held = type("Held", (Settings,), {"reference_weight": 0.01})
    for views in held_contexts(group, held, MOMENT):
        assert [(view.template, view.slot, view.anchor, view.read, view.weights) for view in views] == [
            ("teacher", "s", 0.0, 1.0, "teacher"),
            ("plain", None, 1.0, None, "base"),
        ]
    assert all(len(views) == 1 for views in held_contexts(group, Settings, MOMENT))
    off = type("Off", (Settings,), {"golden_weight": 0.0})
    assert golden_rollouts(group, off, MOMENT) == [None] * 3


def test_micro_batches_of_two_and_one_are_one_of_four(build, rows):
    steps = []
    for size, splits in ((4, 1), (2, 2), (1, 4)):
        trainer = build(per_device_train_batch_size=size, gradient_accumulation_steps=splits, golden_weight=0.7)
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    for step in steps[1:]:
        assert_same_step(step, steps[0])


def test_the_log_tells_the_teacher_from_the_reference(build, rows):
    trainer = build()
    first = student_of(trainer)
    moved(trainer)
    _, parts = by_hand(trainer, first, first, rows)
    whole_step(trainer, rows)
    logged = trainer.diagnostics["train"].means(lambda sums: sums, trainer.accelerator.device)
    assert logged["reference_divergence"] == pytest.approx(parts[1], **EXACT)
    assert logged["extras/loss"] == pytest.approx(parts[2], **EXACT)
    counts = [len(ids) for ids in trainer._generate_single_turn([None] * 4)[0]]
    ratios = []
    for row, ids in zip(rows, trainer._generate_single_turn([None] * 4)[0], strict=True):
        own = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        shown = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])
        log_probs = (
            token_log_probs(raw_logits(model, context, ids), ids, HEAT).sum().item()
            for model, context in ((student_of(trainer), own), (first, shown))
        )
        ratios.append(next(log_probs) - next(log_probs))
    assert logged["divergence"] == pytest.approx(sum(ratios) / sum(counts), rel=1e-5)


def test_a_run_logs_and_moves(build):
    trainer = build(learning_rate=0.05, max_steps=2, logging_steps=1)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert abs(first["reference_divergence"]) < 1e-9 < second["reference_divergence"]
    assert first["extras/loss"] > second["extras/loss"] > 0


def test_a_reward_adds_grpo_in_the_same_step(build, dataset):
    rows, steps = [dataset[index] for index in (0, 0, 0, 0, 5, 5, 5, 5)], []
    for weight in (0.0, 0.5):
        trainer = build(reward_weight=weight, num_generations=4, per_device_train_batch_size=8)
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    model = student_of(trainer)
    value, surrogate = grpo_by_hand(trainer, model, rows)
    (0.5 * surrogate).backward()
    own = gradients_of(model)
    total = {name: gradient + own[name] for name, gradient in steps[0][1].items()}
    assert_same_step(steps[1], (steps[0][0] + 0.5 * value.item(), total), abs=1e-6)


def test_a_lora_run_starts_at_the_reference_and_evaluates(build_group, dataset, make_args, make_model, tokenizer):
    args = {**SMALL, "max_steps": 1, "logging_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = StableOPDTrainer(
        model=make_model(torch.float64),
        args=make_args(StableOPDConfig, **args),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["reference_divergence"]) < 1e-9
    assert trainer.teacher.adapter_off and not trainer.scorer._owners["base"].values
    metrics = trainer.evaluate()
    assert metrics["eval_reference_divergence"] > 0 and metrics["eval_extras/loss"] > 0


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"golden_weight": -0.1}, "golden_weight=-0.1 is not valid"),
        ({"reference_weight": -1.0}, "reference_weight=-1.0 is not valid"),
        ({"divergence": "forward_kl"}, "divergence='forward_kl' is not possible"),
        ({"clip": "upper"}, "clip='upper' is not possible"),
        ({"num_generations": 0}, "num_generations=0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(make_args, bad, told):
    with pytest.raises(ValueError, match=told):
        make_args(StableOPDConfig, **bad)


def test_a_row_without_a_solution_is_refused_before_the_first_step(build_group, dataset):
    rows = dataset.map(lambda row, place: {"solution": None if place == 2 else row["solution"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 2"):
        build_group(StableOPDTrainer, TEXTS, rows, **SMALL)


def test_the_defaults_are_the_papers_and_a_re_implementations():
    args = StableOPDConfig(output_dir="out", use_cpu=True, bf16=False)
    # arXiv 2604.08527: a prompt has 4 rollouts, a batch 64 prompts, 1e-6. l_g and b: a re-implementation.
    assert (args.num_generations, args.learning_rate) == (4, 1e-6)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64 * 4
    assert (args.golden_weight, args.reference_weight, args.reward_weight) == (0.1, 0.01, 0.0)
    assert (args.divergence, args.clip, args.temperature) == ("reverse_kl", None, 1.0)
