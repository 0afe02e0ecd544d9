# SPDX-License-Identifier: Apache-2.0
"""MSD: the weight of a token against loops over a vocabulary, the whole step by hand, and OPSD where all weights are equal."""

import math

import pytest
import torch
from datasets import Dataset
from groups import ids_of
from pages import MOMENT, assert_same_step, moved, raw_logits, student_of, whole_step

from trl_opsd import OPSDTrainer
from trl_opsd.experimental.msd import method
from trl_opsd.experimental.msd.method import MSD, translated_contexts
from trl_opsd.experimental.msd.trainer import MSDConfig, MSDTrainer
from trl_opsd.losses import critical_weight
from trl_opsd.losses.divergences import top_entropy
from trl_opsd.teacher.contexts import Rollout

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
K = 4


@pytest.fixture
def rows(dataset):
    return Dataset.from_list([{**row, "translation": f"add {index} numbers"} for index, row in enumerate(dataset)])


@pytest.fixture
def build(build_group, rows):
    def build(trainer_class=MSDTrainer, **settings):
        own = {"critical_top_k": K} if trainer_class is MSDTrainer else {}
        return build_group(trainer_class, TEXTS, rows, **{"max_completion_length": 30, **own, **settings})

    return build


def surety_by_hand(p, k):
    """1 - H / log k over the k largest of a distribution, as numbers of Python."""
    kept = sorted(p, reverse=True)[:k]
    shares = [x / sum(kept) for x in kept]
    return 1 + sum(x * math.log(x) for x in shares if x > 0) / math.log(k)


def weights_by_hand(targets, students, tokens, k):
    """Weights of a rollout from distributions (T, V) and sampled tokens."""
    products = [surety_by_hand(p, k) * (1 - q[y]) for p, q, y in zip(targets, students, tokens, strict=True)]
    mean = sum(products) / len(products)
    return [product / mean for product in products]


def weights_of(target_logits, student_logits, tokens, mask=None, k=K):
    log_prob = student_logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    mask = torch.ones_like(log_prob) if mask is None else mask
    return critical_weight(top_entropy(target_logits.log_softmax(-1), k), log_prob, mask, k=k)


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_weight_equals_its_formula_and_its_mean_over_a_rollout_is_one():
    target, student, tokens = 2 * draw(3, 5, 9, seed=0), draw(3, 5, 9, seed=1), torch.arange(15).view(3, 5) % 9
    mask = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    got = weights_of(target, student, tokens, mask)
    for row in range(3):
        used = mask[row].bool()
        parts = (target[row].softmax(-1)[used], student[row].softmax(-1)[used], tokens[row][used])
        wanted = torch.tensor(weights_by_hand(*(part.tolist() for part in parts), K), dtype=torch.float64)
        torch.testing.assert_close(got[row][used], wanted, rtol=0, atol=1e-12)
        assert got[row][used].mean().item() == pytest.approx(1, abs=1e-12) and (got[row][~used] == 0).all()
    assert not got.requires_grad


def test_a_sure_teacher_weighs_fully_an_unsure_one_and_a_sure_student_not_at_all():
    peaked, flat = torch.zeros(1, 2, 9, dtype=torch.float64), torch.zeros(1, 2, 9, dtype=torch.float64)
    peaked[..., 3] = 900.0
    student, tokens = draw(1, 2, 9, seed=2), torch.tensor([[3, 5]])
    one_hot = weights_of(peaked, student, tokens)
    surprise = 1 - student.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(one_hot, surprise / surprise.mean(), rtol=0, atol=1e-12)  # w_T is 1 throughout
    mixed = weights_of(torch.cat([peaked[:, :1], flat[:, :1]], dim=1), student, tokens)
    torch.testing.assert_close(mixed, torch.tensor([[2.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert (weights_of(flat, student, tokens) == 0).all()  # nothing is critical: no 0 / 0
    sure = torch.zeros(1, 2, 9, dtype=torch.float64)
    sure[0, 0, 3] = 900.0
    assert weights_of(peaked, sure, tokens).tolist() == [[0.0, 2.0]]


def by_hand(trainer, teacher_model, rows):
    args, model, losses = trainer.args, student_of(trainer), []
    completions = trainer._generate_single_turn([None] * len(rows))[0]
    for row, completion in zip(rows, completions, strict=True):
        student = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        text = args.translated_prompt_template.replace("{prompt}", row["prompt"][-1]["content"])
        shown = [{"role": "user", "content": text.replace("{translation}", row["translation"])}]
        teacher = ids_of(trainer, shown, **args.teacher_chat_template_kwargs)
        log_q = (raw_logits(model, student, completion) / args.temperature).log_softmax(-1)
        log_p = (raw_logits(teacher_model, teacher, completion).detach() / args.temperature).log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        distributions = (log_p.exp().tolist(), log_q.exp().tolist())
        losses.append((torch.tensor(weights_by_hand(*distributions, completion, K)) * kl).mean())
    loss = sum(losses) / len(losses)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_step_equals_its_formula_from_raw_logits(build, rows):
    trainer = build()
    first = student_of(trainer)
    moved(trainer)
    chosen = [rows[index] for index in range(4)]
    assert_same_step(whole_step(trainer, chosen), by_hand(trainer, first, chosen))


def test_two_micro_batches_of_two_are_one_of_four(build, rows):
    chosen, steps = [rows[index] for index in range(4)], []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        trainer = build(**settings)
        moved(trainer)
        steps.append(whole_step(trainer, chosen))
    assert_same_step(steps[1], steps[0])


def test_with_equal_weights_it_is_opsd_with_the_unclipped_reverse_divergence(build, rows, monkeypatch):
    monkeypatch.setattr(method, "critical_weight", lambda entropy, log_prob, mask, k: torch.ones_like(log_prob))
    chosen, steps = [{**rows[index], "solution": rows[index]["translation"]} for index in range(4)], []
    for trainer_class, settings in (
        (MSDTrainer, {"translated_prompt_template": "{prompt} is {translation}"}),
        (
            OPSDTrainer,
            {
                "teacher_prompt_template": "{prompt} is {solution}",
                "divergence": "reverse_kl",
                "clip": None,
                "loss_reduction": "sequence",
            },
        ),
    ):
        trainer = build(trainer_class, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, chosen))
    assert_same_step(*steps)


def test_a_row_without_a_translation_is_left_out_and_says_why(build, dataset, build_group):
    for text in (None, "  "):
        (views,) = translated_contexts([Rollout("x", None, "y", columns={"translation": text})], None, MOMENT)
        assert views == () and views.reason == "no translation"
    with pytest.raises(ValueError, match="train_dataset has no column `translation`, which MSD reads"):
        build_group(MSDTrainer, TEXTS, dataset)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"critical_top_k": 1}, "critical_top_k=1"),
        ({"translated_prompt_template": "{prompt}"}, "translated_prompt_template does not contain {translation}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(MSDConfig, **bad)


def test_the_papers_numbers_are_the_defaults():
    args = MSDConfig("out", bf16=False, use_cpu=True)
    # arXiv 2605.02971 as noted: reverse KL, the teacher's top 32, frozen, batch 16.
    assert (args.divergence, args.clip, args.critical_top_k, args.teacher_model_kind) == (
        "reverse_kl",
        None,
        32,
        "base",
    )
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert "inferred" in MSD.inferred and not MSD.needs_solution
