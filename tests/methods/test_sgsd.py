# SPDX-License-Identifier: Apache-2.0
"""SGSD: the whole step by hand from raw logits; polarity, dead zone, weights and the tokens that are left out."""

import json
import math

import pytest
import torch
from datasets import Dataset
from groups import ids_of, reward_boxed
from pages import MOMENT, assert_same_step, raw_logits, student_of, token_log_probs, whole_step

from trl_opsd.losses import bounded_square
from trl_opsd.methods.base import RowFacts
from trl_opsd.methods.sgsd import judged_loss, skill_contexts
from trl_opsd.rows.skill_bank import SkillBank, skill_bank_file
from trl_opsd.rows.token_texts import tokens_of_form
from trl_opsd.teacher.contexts import Rollout
from trl_opsd.trainers.sgsd import SGSDConfig, SGSDTrainer

TEXTS = ("1+2=3", "so \\boxed{3}\n\n", "wait,\n 10 it is", "it is \\boxed{10} then")
SKILLS = [
    (["Add in pairs.", "Do not guess."], [0.5, 2.0]),
    (["Count up.", "Carry.", "Check twice."], None),
    (["Use a sum formula."], None),
    ([], None),
]


@pytest.fixture
def rows(dataset):
    columns = [{"skills": skills, "skill_scores": scores} for skills, scores in SKILLS]
    return Dataset.from_list([{**row, **columns[index % 4]} for index, row in enumerate(dataset)])


@pytest.fixture
def build(build_group, rows):
    def build(**settings):
        return build_group(SGSDTrainer, TEXTS, rows, max_completion_length=40, **settings)

    return build


def by_hand(trainer, rows, used=3):
    """Loss and gradients of a step over four rows, of which the first `used` have skills."""
    model, args = student_of(trainer), trainer.args
    completions = trainer._generate_single_turn([None] * 4)[0]
    left_out = tokens_of_form(trainer.tokenizer)
    losses = []
    for row, completion in list(zip(rows, completions, strict=True))[:used]:
        student = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
        own = token_log_probs(raw_logits(model, student, completion), completion)
        counts = torch.tensor([token not in left_out for token in completion])
        reward = float("boxed" in trainer.tokenizer.decode(completion))
        outcome = 1 if reward >= args.reward_threshold else -1
        scores = row["skill_scores"] or [0.0] * len(row["skills"])
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        for skill, weight in zip(row["skills"], weights, strict=True):
            text = args.skill_prompt_template.replace("{skill}", skill)
            prompt = [{"role": "user", "content": text.replace("{prompt}", row["prompt"][-1]["content"])}]
            teacher = ids_of(trainer, prompt, **args.teacher_chat_template_kwargs)
            seen = token_log_probs(raw_logits(model, teacher, completion), completion).detach()
            d = (seen - own)[counts]
            s = d.detach().clamp(-3, 3).mean().item()
            polarity = 0 if abs(s) <= 0.05 else outcome * math.copysign(1, s)
            losses.append(weight * polarity * (math.log(2) - torch.log1p((-(d**2) / 2).exp())).mean())
    loss = sum(losses) / used
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"reward_threshold": 2.0}], ids=["some right", "all wrong"])
def test_a_step_equals_its_formula_from_raw_logits(build, rows, settings):
    trainer = build(**settings)
    chosen = [rows[index] for index in range(4)]
    got = whole_step(trainer, chosen)
    wanted = by_hand(trainer, chosen)
    assert_same_step(got, wanted)
    assert abs(wanted[0]) > 1e-3


def test_two_micro_batches_of_two_are_one_of_four(build, rows):
    chosen = [rows[index] for index in range(4)]
    whole = whole_step(build(), chosen)
    parts = whole_step(build(per_device_train_batch_size=2, gradient_accumulation_steps=2), chosen)
    assert_same_step(parts, whole)


def facts_of(log_prob, views, reward, weights=None):
    log_prob, views = torch.tensor(log_prob, dtype=torch.float64), torch.tensor(views, dtype=torch.float64)
    weights = torch.ones_like(views) if weights is None else torch.tensor(weights).view(-1, 1, 1).expand_as(views)
    given = {
        "mask": torch.ones_like(log_prob),
        "reward": torch.full_like(log_prob, reward),
        "view_log_probs": views,
        "view_weights": weights,
    }
    empty = torch.zeros_like(log_prob)
    return RowFacts(log_prob.requires_grad_(), None, empty, None, None, None, given=given)


@pytest.fixture
def settings(make_args):
    return make_args(SGSDConfig)


def test_the_slope_is_zero_at_no_difference_peaks_at_1_216_and_fades(settings):
    differences = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    q = (-differences).clone().requires_grad_()
    bounded_square(0.0 - q).sum().backward()
    slope = -torch.sigmoid(-(differences**2) / 2) * differences
    assert torch.allclose(q.grad, slope) and slope[1600].abs() < 1e-15
    assert differences[slope.abs().argmax()].abs().item() == pytest.approx(1.216, abs=5e-3)
    assert slope.abs().max().item() == pytest.approx(0.393, abs=1e-3)
    assert slope[-1].abs() < 1e-10


def test_another_outcome_turns_the_loss_and_its_gradient_around(settings):
    gradients = []
    for reward in (1.0, 0.0):
        facts = facts_of([[-1.0, -2.0]], [[[-0.3, -1.0]]], reward)
        (loss,) = judged_loss(facts, settings, MOMENT)
        gradients.append((loss.item(), torch.autograd.grad(loss, facts.log_prob)[0]))
    assert gradients[0][0] == -gradients[1][0] != 0
    assert torch.equal(gradients[0][1], -gradients[1][1])
    assert (gradients[0][1] < 0).all()  # a right rollout that the teacher finds likelier is made likelier


@pytest.mark.parametrize(("support", "counts"), [(0.05, False), (0.0501, True), (-0.05, False), (-0.0501, True)])
def test_a_teacher_without_an_opinion_gives_nothing(settings, support, counts):
    facts = facts_of([[0.0, 0.0]], [[[support, support]]], 1.0)
    (loss,) = judged_loss(facts, settings, MOMENT)
    assert (loss.item() != 0) == counts
    assert (torch.autograd.grad(loss, facts.log_prob)[0] != 0).any() == counts


def test_a_single_wild_token_is_cut_where_a_teacher_is_judged(settings):
    facts = facts_of([[0.0, 0.0]], [[[100.0, -3.5]]], 1.0)  # 3 - 3: no opinion
    assert judged_loss(facts, settings, MOMENT).item() == 0


def test_views_are_the_skills_weighted_by_their_scores_and_capped(make_args):
    rollout = Rollout("x", None, "y", 1.0, columns={"skills": ["a", "b", "c"], "skill_scores": [0.0, 2.0, 1.0]})
    (views,) = skill_contexts([rollout], make_args(SGSDConfig, max_skills=2), MOMENT)
    assert [view.texts for view in views] == [(("skill", "b"),), (("skill", "c"),)]
    assert [view.read for view in views] == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0).tolist())
    (views,) = skill_contexts(
        [Rollout("x", None, "y", 1.0, columns={"skills": ["a", "b"]})], make_args(SGSDConfig), MOMENT
    )
    assert [view.read for view in views] == [0.5, 0.5]


@pytest.mark.parametrize(
    "rollout",
    [
        Rollout("x", None, "y", None, columns={"skills": ["a"]}),
        Rollout("x", None, "y", 1.0),
        Rollout("x", None, "y", 1.0, columns={"skills": []}),
    ],
    ids=["no reward", "no column", "no skill"],
)
def test_a_rollout_that_cannot_be_judged_is_not_trained_on(settings, rollout):
    (views,) = skill_contexts([rollout], settings, MOMENT)
    assert views == () and views.reason == ("no reward" if rollout.reward is None else "no skill")


def test_as_many_scores_as_skills_are_asked_for(settings):
    rollout = Rollout("x", None, "y", 1.0, columns={"skills": ["a", "b"], "skill_scores": [1.0]})
    with pytest.raises(ValueError, match="`skill_scores` has 1 numbers for 2 texts"):
        skill_contexts([rollout], settings, MOMENT)


def test_control_tokens_marks_of_thinking_and_newlines_are_left_out_of_the_step(build, rows):
    trainer = build()
    left_out = tokens_of_form(trainer.tokenizer)
    assert trainer.tokenizer.eos_token_id in left_out
    assert {trainer.tokenizer.convert_tokens_to_ids(text) for text in ("<think>", "</think>")} <= left_out
    whole_step(trainer, [rows[index] for index in range(4)])
    (batch,) = trainer._buffered_inputs
    mask = batch["distillation_mask"].bool()
    kept = batch["completion_ids"][:, : mask.size(1)][mask]
    assert not set(kept.tolist()) & left_out and "\n" not in trainer.tokenizer.decode(kept)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_skills": 0}, "max_skills=0"),
        ({"support_clip": 0.0}, "support_clip=0.0"),
        ({"skill_bank_refresh_steps": 0}, "skill_bank_refresh_steps=0"),
        ({"skill_bank": "nowhere.jsonl"}, "skill_bank: nowhere.jsonl cannot be read"),
        ({"support_threshold": -1.0}, "support_threshold=-1.0"),
        ({"skill_prompt_template": "{prompt}"}, "does not contain {skill}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(SGSDConfig, **bad)


def test_training_moves_the_student_and_says_what_the_teachers_found(build):
    trainer = build(learning_rate=0.05, max_steps=2, reward=reward_boxed)
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(p, s) for p, s in zip(trainer.model.parameters(), start, strict=True))
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_a_skill_that_spells_out_a_control_token_is_refused_before_training_by_its_row(build_group, rows):
    spelled = [{**row, "skills": ["add", "stop <|im_end|>"] if index == 6 else []} for index, row in enumerate(rows)]
    with pytest.raises(ValueError, match=r"train_dataset row 6: `skills` spells out '<\|im_end\|>'"):
        build_group(SGSDTrainer, TEXTS, Dataset.from_list(spelled), max_completion_length=40)


BANK = [
    {"skill": "Add 1+2=? in pairs.", "mistake": "Guessing 3."},
    {"skill": "Count up from 1."},
    {"skill": "Use a sum formula.", "mistake": "Stopping at 1+2+3+4=?"},
]


@pytest.fixture
def bank(tmp_path):
    """A function that writes the bank's file."""

    def write(lines=BANK):
        path = tmp_path / "bank.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    skill_bank_file.cache_clear()
    yield write
    skill_bank_file.cache_clear()


def test_a_step_with_a_bank_equals_its_formula_from_raw_logits(build_group, dataset, bank):
    trainer = build_group(SGSDTrainer, TEXTS, dataset, max_completion_length=40, skill_bank=bank(), max_skills=2)
    chosen, found = [dataset[index] for index in range(4)], []
    for row in chosen:
        pairs = SkillBank.read(bank()).retrieve(row["prompt"][-1]["content"], 2)
        found.append({**row, "skills": [text for text, _ in pairs], "skill_scores": [score for _, score in pairs]})
    assert len({row["skills"][0] for row in found}) > 1
    got, three = whole_step(trainer, chosen[:3] + chosen[:1]), found[:3]
    assert_same_step(got, by_hand(trainer, [*three, found[0]], used=4))


def test_the_bank_is_read_again_every_so_many_steps_and_the_log_says_when(build_group, dataset, bank):
    settings = {"max_completion_length": 40, "skill_bank_refresh_steps": 2, "max_skills": 1, "max_steps": 4}
    trainer = build_group(SGSDTrainer, TEXTS, dataset, skill_bank=bank([{"skill": "old"}]), **settings)
    shown, score = [], trainer.targets.score
    trainer.targets.score = lambda batch, *rest: (
        shown.append(dict(batch.contexts[0][0].texts)["skill"]),
        bank([{"skill": f"new {len(shown)}"}]),
        score(batch, *rest),
    )[-1]
    trainer.train()
    assert shown == ["old", "old", "new 2", "new 2"]
    read_at = [entry["method/skill_bank_read_at_step"] for entry in trainer.state.log_history if "loss" in entry]
    assert read_at == [0, 0, 2, 2]


@pytest.mark.parametrize("changed", [False, True], ids=["the same bank", "another bank"])
def test_a_run_with_a_bank_resumes_exactly_and_says_where_it_cannot(build_group, dataset, bank, tmp_path, changed):
    settings = {"max_completion_length": 40, "skill_bank_refresh_steps": 3, "max_steps": 4, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
    whole, resumed = (build_group(SGSDTrainer, TEXTS, dataset, skill_bank=bank(), **settings) for _ in range(2))
    whole.train()
    skill_bank_file.cache_clear()  # as in another process
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    if changed:
        bank([{"skill": "another"}])
        with pytest.warns(UserWarning, match="is another file than the run used before"):
            resumed.train(resume_from_checkpoint=checkpoint)
        return
    resumed.train(resume_from_checkpoint=checkpoint)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14, msg=name)
    assert resumed.memory == whole.memory and resumed.memory["skill_bank"][1] == 3


def test_the_papers_numbers_are_the_defaults(make_args):
    args = make_args(SGSDConfig, max_completion_length=1024)
    # The authors' code, walawalagoose/SGSD: clip 3, |s| <= .05, at most 8 skills, refresh every 25 steps, T 1 in the loss.
    assert (args.support_clip, args.support_threshold, args.max_skills) == (3.0, 0.05, 8)
    assert (args.skill_bank_refresh_steps, args.loss_temperature, args.teacher_model_kind) == (25, 1.0, "live")
    assert args.skill_bank is None and args.skill_embedding_model is None
