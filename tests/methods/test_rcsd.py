# SPDX-License-Identifier: Apache-2.0
"""RCSD: an analysis is written, then read; the step by hand over the teacher's likeliest tokens, and OPSD as its special case."""

import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from groups import ids_of
from pages import assert_same_step, moved, raw_logits, student_of, whole_step

from trl_opsd import OPSDTrainer
from trl_opsd.losses import token_divergence
from trl_opsd.methods.rcsd import analysis_request, guided_contexts
from trl_opsd.teacher.contexts import TEACHER_PROMPT_TEMPLATE, Rollout
from trl_opsd.trainers.rcsd import RCSDConfig, RCSDTrainer

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
NOTES = ("add in order", "carry", "box it", "name {guidance}, \\boxed{5}")
RUBRICS = [["adds", "boxes a {prompt}"], ["adds"], [], None]


@pytest.fixture
def rows(dataset):
    return Dataset.from_list([{**row, "rubric": RUBRICS[index % 4]} for index, row in enumerate(dataset)])


@pytest.fixture
def build(build_group, rows, monkeypatch):
    """A trainer that samples its rollouts first and its analyses second, and remembers what was asked."""

    def build(trainer_class=RCSDTrainer, **settings):
        trainer = build_group(trainer_class, TEXTS, rows, **{"max_completion_length": 30, **settings})
        trainer.asked = []

        def sample(prompts, *args, **kwargs):
            trainer.asked.append(prompts)
            texts = NOTES if len(trainer.asked) == 2 else TEXTS
            return [completion_of(trainer, text) for text in texts[: len(prompts)]], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        return trainer

    return build


def completion_of(trainer, text):
    return [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]


def guidance_of(row):
    rubric, text = row["rubric"], ""
    if rubric:
        text = "\n\nWhat a good solution fulfils:\n" + "\n".join("- " + line for line in rubric)
    return text


def prompt_of(trainer, template, row, guidance):
    """The template split at its slots, so that a text which spells a slot stays as it is."""
    before, rest = template.split("{prompt}")
    middle, rest = rest.split("{solution}")
    last, end = rest.split("{guidance}")
    text = before + row["prompt"][-1]["content"] + middle + row["solution"] + last + guidance + end
    return ids_of(trainer, [{"role": "user", "content": text}], **trainer.args.teacher_chat_template_kwargs)


def by_hand(trainer, teacher_model, rows):
    args, model, total, count = trainer.args, student_of(trainer), 0.0, 0
    for row, text, note in zip(rows, TEXTS, NOTES, strict=True):
        completion = completion_of(trainer, text)
        student = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        teacher = prompt_of(trainer, args.analysis_prompt_template, row, guidance_of(row))
        teacher = teacher + trainer.tokenizer(note + args.bridge, add_special_tokens=False)["input_ids"]
        own = raw_logits(model, student, completion) / args.temperature
        other = raw_logits(teacher_model, teacher, completion).detach() / args.temperature
        kept = other.topk(20, dim=-1).indices
        log_q, log_p = own.gather(-1, kept).log_softmax(-1), other.gather(-1, kept).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).clamp(max=0.05).sum()
        count += len(completion)
    loss = total / count
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_step_equals_its_formula_from_raw_logits(build, rows):
    trainer = build()
    first = student_of(trainer)
    moved(trainer)
    chosen = [rows[index] for index in range(4)]
    got = whole_step(trainer, chosen)
    assert_same_step(got, by_hand(trainer, first, chosen))
    assert trainer.asked[1] == [
        prompt_of(trainer, trainer.args.analysis_prompt_template, row, guidance_of(row)) for row in chosen
    ]
    assert trainer._metrics["train"]["written/texts"] == [4]


def test_two_micro_batches_of_two_are_one_of_four(build, rows):
    chosen, steps = [rows[index] for index in range(4)], []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        trainer = build(**settings)
        moved(trainer)
        steps.append(whole_step(trainer, chosen))
    assert_same_step(steps[1], steps[0])


def test_without_rubric_analysis_and_support_it_is_opsd(build, dataset):
    chosen, steps = [dataset[index] for index in range(4)], []
    template = TEACHER_PROMPT_TEMPLATE.replace("{solution}", "{solution}{guidance}")
    own = {"support_size": None, "write_analysis": False, "guided_prompt_template": template}
    for trainer_class, settings in (
        (RCSDTrainer, own),
        (OPSDTrainer, {"chat_template_kwargs": {"enable_thinking": True}}),
    ):
        trainer = build(trainer_class, temperature=1.2, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, chosen))
        assert len(trainer.asked) == 1  # nothing is sampled for an answer that nobody asked for
    assert_same_step(*steps)


def test_mass_that_moves_outside_the_teachers_likeliest_tokens_changes_nothing(make_args):
    rule = make_args(RCSDConfig, support_size=3).loss_divergence()
    settings = {"divergence": rule.name, "clip": rule.clip, "support": rule.support}
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    outside = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, teacher.topk(3).indices, False)
    moved_logits = torch.where(outside, student + 5 * torch.rand(5, 9, generator=generator), student)
    values = [token_divergence(logits, teacher, **settings) for logits in (student, moved_logits)]
    assert torch.allclose(*values) and values[0].abs().min() > 0
    everything = {"divergence": rule.name, "clip": rule.clip}
    assert not torch.allclose(*(token_divergence(logits, teacher, **everything) for logits in (student, moved_logits)))


def test_a_rubric_may_be_one_text_and_both_parts_may_be_missing(make_args):
    settings = make_args(RCSDConfig, max_completion_length=8)
    for rubric, wanted in (("adds", "\n\nWhat a good solution fulfils:\nadds"), ("  ", ""), ([], ""), (None, "")):
        rollout = Rollout("x", "s", "y", columns={"rubric": rubric})
        ((view,),) = guided_contexts([rollout], settings, None)
        assert dict(view.texts) == {"guidance": wanted} == dict(analysis_request(rollout, settings).texts)
        assert (view.slot, view.anchor) == ("s", 1.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"support_size": 0}, "support_size=0"),
        ({"guided_prompt_template": "{prompt} {solution}"}, "guided_prompt_template does not contain {guidance}"),
        ({"analysis_prompt_template": "{prompt} {guidance}"}, "analysis_prompt_template does not contain {solution}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(RCSDConfig, **bad)


def test_a_run_samples_analyses_of_its_own(build_group, rows):
    trainer = build_group(RCSDTrainer, TEXTS, rows, max_completion_length=8, max_steps=2, learning_rate=0.05)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["loss"]) and entry["written/texts"] == 4


@pytest.mark.parametrize("kind", ["base", "live"])
def test_the_analysis_is_written_with_the_teachers_weights_and_the_students_are_put_back(
    build, rows, monkeypatch, kind
):
    trainer = build(teacher_model_kind=kind)
    first, found, sample = student_of(trainer), [], trainer._generate_single_turn

    def flat(model):
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    moved(trainer)
    start = flat(trainer.model)
    monkeypatch.setattr(
        trainer,
        "_generate_single_turn",
        lambda *given, **rest: (found.append(flat(trainer.model)), sample(*given, **rest))[1],
    )
    whole_step(trainer, [rows[index] for index in range(4)])
    wanted = flat(first) if kind == "base" else start
    assert torch.equal(found[0], start) and torch.equal(found[1], wanted) and torch.equal(flat(trainer.model), start)
    assert trainer.model.training


def test_with_vllm_the_student_writes_and_that_is_told_once(build, rows, monkeypatch):
    trainer = build()
    trainer.targets.settings = SimpleNamespace(**{**vars(trainer.args), "use_vllm": True})
    trainer.targets.settings.distillation_length_at = trainer.args.distillation_length_at
    with pytest.warns(UserWarning, match="RCSD: what the model writes before scoring is written by the student's"):
        assert isinstance(trainer.targets._writing_as({"teacher"}), nullcontext)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(trainer.targets._writing_as({"teacher"}), nullcontext)
    with pytest.raises(ValueError, match="asks names the weights"):
        trainer.targets._writing_as({"teacher", "live"})


def test_rows_without_a_rubric_are_counted_and_still_used(build, rows):
    trainer = build()
    whole_step(trainer, [rows[index] for index in range(4)])
    logged = trainer._metrics["train"]
    assert (logged["rows/no_rubric"], logged["rows/used"]) == ([0.5], [1.0])
    assert trainer._buffered_inputs[0]["distillation_mask"].any(dim=1).all()
