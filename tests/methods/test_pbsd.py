# SPDX-License-Identifier: Apache-2.0
"""PBSD: a pair is a rollout and what the model writes to the privileged prompt; its step by hand, and as TRL's DPO."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from groups import ids_of, privileged
from pages import MOMENT, assert_same_step, gradients_of, moved, raw_logits, student_of, token_log_probs, whole_step
from trl import DPOConfig, DPOTrainer

from trl_opsd.methods.base import RowFacts
from trl_opsd.methods.pbsd import pair_loss
from trl_opsd.trainers.pbsd import PBSDConfig, PBSDTrainer

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
WRITTEN = ("it is clear", "b", "that makes \\boxed{10} then", "so 4")
HEAT = 1.3


@pytest.fixture
def build(build_group, dataset, tokenizer, monkeypatch):
    """A trainer whose rollouts and whose answers to the privileged prompt are given texts, by the prompt alone."""

    def build(**settings):
        settings = {"temperature": HEAT, "max_completion_length": 30, **settings}
        trainer = build_group(PBSDTrainer, TEXTS, **settings)
        monkeypatch.setattr(trainer, "_generate_single_turn", sampler(trainer, dataset))
        return trainer

    return build


def sampler(trainer, dataset):
    """Sampling that knows each row's two prompts, and gives it its own text of the one list or the other."""
    texts = {}
    for index, row in enumerate(dataset):
        bare = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        shown = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])
        texts |= {tuple(bare): TEXTS[index % 4], tuple(shown): WRITTEN[index % 4]}

    def encode(text):
        return [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]

    return lambda prompts, *args, **kwargs: (
        [encode(texts[tuple(ids)])[: trainer.max_completion_length] for ids in prompts],
        None,
    )


def pairs_of(trainer, rows):
    """Student's prompt, teacher's prompt, y- and y+ of each row."""
    for row in rows:
        student = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        teacher = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])
        worse, better = trainer._generate_single_turn([student, teacher])[0]
        yield student, teacher, worse, better


def by_hand(trainer, teacher_model, rows):
    model, losses = student_of(trainer), []
    for student, teacher, worse, better in pairs_of(trainer, rows):
        ratios = [
            token_log_probs(raw_logits(model, student, ids), ids, HEAT).sum()
            - token_log_probs(raw_logits(teacher_model, teacher, ids), ids, HEAT).sum().detach()
            for ids in (better, worse)
        ]
        margin = trainer.args.preference_beta * (ratios[0] - ratios[1])
        losses.append(torch.log1p((-margin).exp()))
    loss = sum(losses) / len(losses)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["base", "live"])
def test_a_step_equals_its_formula_from_raw_logits(build, dataset, kind):
    trainer = build(teacher_model_kind=kind)
    first = student_of(trainer)
    moved(trainer)
    rows = [dataset[index] for index in range(4)]
    got = whole_step(trainer, rows)
    wanted = by_hand(trainer, first if kind == "base" else student_of(trainer), rows)
    assert_same_step(got, wanted)
    assert abs(wanted[0] - math.log(2)) > 1e-2
    metrics = trainer._metrics["train"]
    assert metrics["written/texts"] == [4]
    assert metrics["written/tokens"] == [sum(len(better) for *_, better in pairs_of(trainer, rows))]


def test_two_micro_batches_of_two_are_one_of_four(build, dataset):
    rows, steps = [dataset[index] for index in range(4)], []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        trainer = build(**settings)
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    assert_same_step(steps[1], steps[0])


def test_a_pair_whose_rollout_was_cut_is_left_out_of_sum_and_count(build, dataset):
    trainer = build(mask_truncated_completions=True, max_completion_length=8)
    moved(trainer)
    rows = [dataset[index] for index in range(4)]
    cut = [worse[-1] != trainer.tokenizer.eos_token_id for *_, worse, _ in pairs_of(trainer, rows)]
    assert 0 < sum(cut) < 4
    first = build(mask_truncated_completions=True, max_completion_length=8)
    kept = [row for row, left_out in zip(rows, cut, strict=True) if not left_out]
    assert_same_step(whole_step(trainer, rows), by_hand(trainer, student_of(first), kept))


def test_where_student_and_teacher_are_one_the_loss_is_log_2_and_its_gradient_the_pairs(build, dataset, monkeypatch):
    trainer = build(teacher_chat_template_kwargs={"enable_thinking": False}, preference_beta=0.7)
    rows = [dataset[index] for index in range(4)]
    sequences = [(worse, better) for *_, worse, better in pairs_of(trainer, rows)]
    trainer.scorer.collator.templates["teacher"] = "{prompt}"  # shows nothing
    turns = iter([[worse for worse, _ in sequences], [better for _, better in sequences]])
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (next(turns), None))
    model, total = student_of(trainer), 0.0
    for row, (worse, better) in zip(rows, sequences, strict=True):
        prompt = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        likelihoods = [token_log_probs(raw_logits(model, prompt, ids), ids, HEAT).sum() for ids in (better, worse)]
        total = total - 0.7 / 2 * (likelihoods[0] - likelihoods[1]) / 4
    total.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_step(whole_step(trainer, rows), (math.log(2), wanted))


def test_a_step_is_trls_sigmoid_dpo_with_the_teachers_log_probabilities_as_reference(
    build, dataset, make_model, tokenizer, tmp_path
):
    trainer = build(temperature=1.0, preference_beta=0.5)
    first = student_of(trainer)
    moved(trainer)
    rows = [dataset[index] for index in range(4)]
    pairs = list(pairs_of(trainer, rows))
    dpo = dpo_trainer(make_model, tokenizer, tmp_path, beta=0.5)
    dpo.model.load_state_dict(trainer.model.state_dict())
    dpo.model.train()
    dpo.precompute_ref_logps = True
    halves = [[(student, pair[place]) for student, *pair in pairs] for place in (2, 1)]  # chosen, then rejected
    with torch.no_grad():
        references = [
            torch.stack([token_log_probs(raw_logits(first, pair[1], pair[place]), pair[place]).sum() for pair in pairs])
            for place in (3, 2)
        ]
    batch = padded([*halves[0], *halves[1]], tokenizer.pad_token_id)
    batch |= {"ref_chosen_logps": references[0], "ref_rejected_logps": references[1]}
    loss = dpo._compute_loss(dpo.model, batch, False)
    loss.backward()
    assert_same_step(whole_step(trainer, rows), (loss.item(), gradients_of(dpo.model)), rel=1e-4)
    assert abs(loss.item() - math.log(2)) > 1e-2


def test_a_swapped_pair_has_the_negative_margin():
    pair = {"log_prob": [[-1.0, -2.0]], "views": [[[-0.5, -1.0]]]}, {"log_prob": [[-3.0]], "views": [[[-1.0]]]}
    losses = [pair_loss(facts(*order), Settings, MOMENT).item() for order in (pair, pair[::-1])]
    margin = Settings.preference_beta * (-2.0 - -1.5)
    assert losses[0] == pytest.approx(math.log1p(math.exp(-margin)))
    assert losses[1] == pytest.approx(math.log1p(math.exp(margin)))


class Settings:
    preference_beta = 0.3


def facts(own, extra=None):
    log_prob = torch.tensor(own["log_prob"], dtype=torch.float64)
    given = {"mask": torch.ones_like(log_prob), "view_log_probs": torch.tensor(own["views"], dtype=torch.float64)}
    nothing = torch.zeros_like(log_prob)
    return RowFacts(log_prob, None, nothing, None, None, None, given, None if extra is None else facts(extra))


def padded(rows, pad_id):
    """Prompt and completion of each row, right-padded, as TRL's DPO takes them."""
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    ends = [width - len(prompt) - len(ids) for prompt, ids in rows]
    parts = list(zip(rows, ends, strict=True))
    return {
        "input_ids": torch.tensor([[*prompt, *ids, *[pad_id] * end] for (prompt, ids), end in parts]),
        "attention_mask": torch.tensor([[*[1] * (width - end), *[0] * end] for _, end in parts]),
        "completion_mask": torch.tensor(
            [[*[0] * len(prompt), *[1] * len(ids), *[0] * end] for (prompt, ids), end in parts]
        ),
    }


def dpo_trainer(make_model, tokenizer, tmp_path, beta):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    return DPOTrainer(
        model=make_model(torch.float64),
        ref_model=make_model(torch.float64),
        args=DPOConfig(
            output_dir=str(tmp_path / "dpo"),
            beta=beta,
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )


def test_an_evaluation_pairs_too_and_writes_one_answer_a_rollout(build, dataset, monkeypatch):
    trainer = build(num_generations_eval=2, per_device_eval_batch_size=4)
    trainer.eval_dataset = dataset.select(range(4))
    sizes = trainer.num_generations, trainer.num_generations_eval
    sample, seen = trainer._generate_single_turn, []

    def recorded(prompts, *args, **kwargs):
        seen.append(trainer.num_generations_eval)
        return sample(prompts, *args, **kwargs)

    monkeypatch.setattr(trainer, "_generate_single_turn", recorded)
    metrics = trainer.evaluate(trainer.eval_dataset)
    assert math.isfinite(metrics["eval_loss"]) and (trainer.num_generations, trainer.num_generations_eval) == sizes
    assert seen == [2, 1] * (len(seen) // 2) and seen


def test_bad_settings_are_refused_by_name(make_args):
    with pytest.raises(ValueError, match="preference_beta=0"):
        make_args(PBSDConfig, preference_beta=0.0)
