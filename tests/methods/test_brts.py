# SPDX-License-Identifier: Apache-2.0
"""BRTS: which candidate is chosen, how candidates are drawn and judged, and the whole step by hand."""

import math
from dataclasses import replace

import pytest
import torch
from groups import ids_of, privileged
from pages import MOMENT, assert_same_step, gradients_of, moved, raw_logits, student_of, whole_step

from trl_opsd.experimental.brts.method import candidate_kind, chosen_candidate, next_candidate, rollout_contexts
from trl_opsd.experimental.brts.settings import BRTSSettings
from trl_opsd.experimental.brts.trainer import BRTSConfig, BRTSTrainer
from trl_opsd.losses import Support
from trl_opsd.teacher.contexts import Draft, Rollout

pytestmark = pytest.mark.filterwarnings("ignore:.* is experimental")

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
# Of each rollout the first candidate, the second, and the guided one: right where it boxes anything.
CANDIDATES = (
    ("so \\boxed{3}", "1+2=3 \\boxed{3}", "not asked"),  # both right: the second overlaps more
    ("1+2", "it is \\boxed{3}", "not asked"),  # one right
    ("no", "5", "then \\boxed{10}"),  # guided
    ("a b", "b", "still wrong"),  # none
)
HEAT = 1.2
K = 25
SMALL = {
    "temperature": HEAT,
    "max_completion_length": 30,
    "num_generations": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "support_size": K,
    "candidate_weight": 0.7,
}


def draft(reward, overlap, text="c"):
    return Draft(text, [1], reward, overlap)


def rollout_of(*drafts):
    return Rollout("x", "s", "y", 0.0, drafts=drafts)


# drafts, whether a fallback is taken, the place of the chosen one, its kind
TIERS = [
    ((draft(1.0, 0.2), draft(1.0, 0.6)), True, 1, ""),
    ((draft(1.0, 0.6), draft(1.0, 0.6)), True, 0, ""),  # the first of equals
    ((draft(1.0, 0.2), draft(0.0, 0.9)), True, 0, ""),  # correctness first
    ((draft(0.5, 0.2), draft(None, 0.9)), True, 0, ""),  # at the threshold; without a reward nothing is right
    ((draft(0.0, 0.9), draft(0.0, 0.1), draft(1.0, 0.0)), True, 2, "guided candidate"),
    ((draft(0.0, 0.1), draft(0.0, 0.4), draft(0.0, 0.9)), True, 1, "wrong candidate"),  # of the first N alone
    ((draft(0.0, 0.1), draft(0.0, 0.4), draft(0.0, 0.9)), False, None, "no candidate"),
    ((draft(0.0, 0.1), draft(0.0, 0.4), draft(1.0, 0.0)), False, 2, "guided candidate"),
]


@pytest.mark.parametrize(("drafts", "falls_back", "place", "kind"), TIERS)
def test_the_tiers(drafts, falls_back, place, kind):
    settings = BRTSSettings(candidate_fallback="most_similar" if falls_back else "skip")
    rollout = rollout_of(*drafts)
    assert chosen_candidate(rollout, settings) is (None if place is None else drafts[place])
    assert candidate_kind(rollout, settings) == kind
    (views,) = rollout_contexts([rollout], settings, MOMENT)
    assert [view.template for view in views] == ["teacher"] and getattr(views, "reason", "") == kind


def test_the_teacher_answers_its_own_prompt_n_times_and_a_guided_one_where_none_was_right():
    settings = BRTSSettings(num_candidates=2, num_guided_candidates=2)

    def asked(*rewards, **changes):
        rollout = rollout_of(*(draft(reward, 0.0) for reward in rewards))
        view = next_candidate(rollout, replace(settings, **changes), MOMENT)
        return view and view.template

    assert [asked(), asked(1.0)] == ["teacher", "teacher"]
    assert [asked(0.0, 1.0), asked(1.0, 0.0)] == [None, None]
    assert [asked(0.0, None), asked(0.0, 0.0, 0.0)] == ["guided", "guided"]
    assert [asked(0.0, 0.0, 1.0), asked(0.0, 0.0, 0.0, 0.0)] == [None, None]
    assert asked(0.0, 0.0, num_guided_candidates=0) is asked(candidate_weight=0.0) is None


@pytest.fixture
def build(build_group, monkeypatch):
    """A trainer that samples its rollouts first and then rounds of candidates, and remembers prompts and sampling."""

    def build(trainer_class=BRTSTrainer, candidates=CANDIDATES, **settings):
        trainer = build_group(trainer_class, TEXTS, **{**SMALL, **settings})
        trainer.asked, sample = [], trainer._generate_single_turn
        trainer.sample_rollouts = sample

        def answer(prompts, *args, **kwargs):
            drawn = trainer.generation_config
            trainer.asked.append((prompts, drawn.temperature, drawn.top_p))
            if len(trainer.asked) == 1:
                return sample(prompts)
            return [ids_of_text(trainer, own[len(trainer.asked) - 2]) for own in candidates], None

        monkeypatch.setattr(trainer, "_generate_single_turn", answer)
        return trainer

    return build


@pytest.fixture
def rows(dataset):
    return [dataset[index] for index in range(4)]


def ids_of_text(trainer, text):
    return [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]


def test_candidates_are_drawn_at_their_own_temperature_from_the_teachers_prompt_and_the_guided_one(build, rows):
    trainer = build()
    whole_step(trainer, rows)
    (student, *rollouts), *drawn = trainer.asked
    assert rollouts == [HEAT, 1.0] and [own[1:] for own in drawn] == [(0.7, 0.95)] * 3
    assert (trainer.generation_config.temperature, trainer.generation_config.top_p) == (HEAT, 1.0)
    shown = [privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"]) for row in rows]
    guided = [privileged(trainer, row, trainer.args.guided_prompt_template, row["solution"]) for row in rows]
    assert drawn[0][0] == drawn[1][0] == shown
    assert drawn[2][0] == [*student[:2], *guided[2:]]  # what is written for the first two is thrown away
    metrics = trainer._metrics["train"]
    assert metrics["drafts/texts"] == [10] and metrics["drafts/right"] == [4 / 10]
    assert metrics["rows/guided_candidate"] == metrics["rows/wrong_candidate"] == [1 / 4]
    assert metrics["rows/used"] == [1.0]


def test_what_reward_functions_log_of_candidates_is_in_no_log(build, rows):
    seen = []

    def reward_and_tell(completions, log_metric, log_extra, **kwargs):
        seen.append(len(completions))
        log_metric("told", float(len(seen)))
        log_extra("place", list(range(len(completions))))
        return [float("boxed" in completion[0]["content"]) for completion in completions]

    trainer = build(reward=reward_and_tell)
    for _ in range(2):  # TRL logs what was told before the next batch's rollouts were judged
        trainer.asked.clear()
        whole_step(trainer, rows)
    assert seen == [4] * 8  # rollouts and three rounds, twice
    assert trainer._metrics["train"]["told"] == [1.0, 5.0]
    assert list(trainer._logs["extra"]["place"]) == [0, 1, 2, 3] and not trainer._pending_extra_logs


def overlap_by_hand(model, prompt, rollout, candidate):
    """Token by token: is the candidate's among the k largest logits at its place of the rollout?"""
    logits, hits = raw_logits(model, prompt, rollout).tolist(), 0
    for place, token in enumerate(candidate):
        if place < len(rollout):
            hits += sum(other > logits[place][token] for other in logits[place]) < K
    return hits / len(candidate)


def test_overlap_is_counted_on_the_students_likeliest_tokens_along_the_rollout(build, rows):
    trainer = build()
    moved(trainer)
    model = student_of(trainer)
    whole_step(trainer, rows)
    ids = trainer.sample_rollouts([None] * 4)[0]
    found = [[each.overlap for each in rollout.drafts] for rollout in trainer._batch.rollouts]
    wanted = []
    for row, rollout, written in zip(rows, ids, CANDIDATES, strict=True):
        prompt = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        wanted.append([overlap_by_hand(model, prompt, rollout, ids_of_text(trainer, text)) for text in written])
    wanted = [own[: len(drafts)] for own, drafts in zip(wanted, found, strict=True)]
    assert found == wanted
    flat = [share for own in found for share in own]
    assert max(flat) > 0 and len(set(flat)) > 4
    assert trainer._metrics["train"]["drafts/overlap"] == pytest.approx([sum(flat) / len(flat)])


def likeliest_and_rest(log_q, log_p, places):
    """Both restricted to `places` (T, K) and one entry for all others."""
    kept = [log.exp().gather(-1, places) for log in (log_q, log_p)]
    return [torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1) for own in kept]


def reverse(log_q, log_p):
    q, p = likeliest_and_rest(log_q, log_p, log_q.topk(K).indices)
    return (q * (q / p).log()).sum(-1)


def forward(log_q, log_p):
    q, p = likeliest_and_rest(log_q, log_p, log_p.topk(K).indices)
    return (p * (p / q).log()).sum(-1)


def by_hand(trainer, teacher, rows, chosen, weight=0.7):
    """Both means, each over the tokens of its kind, from plain forwards."""
    model, parts = student_of(trainer), ([], [])
    for row, ids, text in zip(rows, trainer.sample_rollouts([None] * 4)[0], chosen, strict=True):
        own = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        shown = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])

        def logs(sequence, own=own, shown=shown):
            student, other = raw_logits(model, own, sequence), raw_logits(teacher, shown, sequence).detach()
            return [(logits / HEAT).log_softmax(-1) for logits in (student, other)]

        parts[0].append(reverse(*logs(ids)))
        if text is not None:
            parts[1].append(forward(*logs(ids_of_text(trainer, text))))
    loss = torch.cat(parts[0]).mean() + (weight * torch.cat(parts[1]).mean() if weight else 0)
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("kind", ["base", "live"])
@pytest.mark.parametrize("fallback", ["most_similar", "skip"])
def test_a_step_is_both_divergences_from_raw_logits(build, rows, kind, fallback):
    trainer = build(teacher_model_kind=kind, candidate_fallback=fallback)
    first = student_of(trainer)
    moved(trainer)
    teacher = first if kind == "base" else student_of(trainer)
    got = whole_step(trainer, rows)
    drafts = [rollout.drafts for rollout in trainer._batch.rollouts]
    first_two = max(drafts[0], key=lambda each: each.overlap).text
    wrong = max(drafts[3][:2], key=lambda each: each.overlap).text if fallback == "most_similar" else None
    chosen = [first_two, CANDIDATES[1][1], CANDIDATES[2][2], wrong]
    assert_same_step(got, by_hand(trainer, teacher, rows, chosen))
    (batch,) = trainer._buffered_inputs
    assert batch["extra_mask"].any(1).sum() == (4 if wrong else 3)


def test_without_candidates_it_is_distillation_on_the_rollouts(build, rows):
    trainer = build(candidate_weight=0.0)
    first = student_of(trainer)
    moved(trainer)
    assert_same_step(whole_step(trainer, rows), by_hand(trainer, first, rows, [None] * 4, weight=0))
    assert len(trainer.asked) == 1 and "rows/used" not in trainer._metrics["train"]


def test_a_candidate_that_is_the_rollout_adds_the_forward_divergence_over_all_tokens(build, rows):
    trainer = build(candidates=[(text,) * 3 for text in TEXTS], support_size=10**6)
    first = student_of(trainer)
    moved(trainer)
    model, terms = student_of(trainer), []
    for row, ids in zip(rows, trainer.sample_rollouts([None] * 4)[0], strict=True):
        own = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        shown = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])
        log_q = (raw_logits(model, own, ids) / HEAT).log_softmax(-1)
        log_p = (raw_logits(first, shown, ids) / HEAT).log_softmax(-1).detach()
        terms.append(((log_q.exp() - 0.7 * log_p.exp()) * (log_q - log_p)).sum(-1))
    loss = torch.cat(terms).mean()
    loss.backward()
    assert_same_step(whole_step(trainer, rows), (loss.item(), gradients_of(model)))
    assert {draft.overlap for rollout in trainer._batch.rollouts for draft in rollout.drafts} == {1.0}


def test_where_no_prompt_has_a_candidate_the_step_is_that_of_the_rollouts(build, rows):
    trainer = build(candidates=[("no",) * 3] * 4, candidate_fallback="skip")
    first = student_of(trainer)
    moved(trainer)
    assert_same_step(whole_step(trainer, rows), by_hand(trainer, first, rows, [None] * 4, weight=0))
    assert trainer._metrics["train"]["rows/no_candidate"] == [1.0]
    assert trainer._metrics["train"]["rows/used"] == [1.0]


def test_two_micro_batches_of_two_are_one_of_four(build, rows):
    steps = []
    for size, splits in ((4, 1), (2, 2)):
        trainer = build(per_device_train_batch_size=size, gradient_accumulation_steps=splits)
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    assert_same_step(steps[1], steps[0])


def test_a_run_writes_its_own_candidates(build_group):
    settings = {**SMALL, "max_completion_length": 8, "max_steps": 2, "learning_rate": 0.05}
    trainer = build_group(BRTSTrainer, TEXTS, **settings)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert math.isfinite(entry["loss"]) and entry["drafts/texts"] >= 8 and 0 <= entry["drafts/overlap"] <= 1
        assert math.isfinite(entry["extras/loss"])


@pytest.mark.parametrize("name", ["tools", "environment_factory"])
def test_what_answers_with_more_than_a_text_is_refused(make_model, make_args, dataset, tokenizer, name):
    with pytest.raises(ValueError, match=f"{name} is given, but BRTS has the reward functions judge"):
        BRTSTrainer(
            model=make_model(),
            args=make_args(BRTSConfig, **SMALL),
            train_dataset=dataset,
            processing_class=tokenizer,
            **{name: [lambda x: x]},
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"support_size": 0}, "support_size=0"),
        ({"candidate_weight": -1.0}, "candidate_weight=-1.0"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"num_guided_candidates": -1}, "num_guided_candidates=-1"),
        ({"candidate_fallback": "best"}, "candidate_fallback='best'"),
        ({"candidate_temperature": 0.0}, "candidate_temperature=0.0"),
        ({"candidate_top_p": 1.5}, "candidate_top_p=1.5"),
        ({"candidate_top_p": 0.0}, "candidate_top_p=0.0"),
        ({"guided_prompt_template": "{prompt}"}, "guided_prompt_template does not contain {solution}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(BRTSConfig, **{**SMALL, **bad})


def test_without_a_reward_it_is_refused(make_model, make_args, dataset, tokenizer):
    rows = dataset.map(lambda row: {"solution": "no answer is here"})
    with pytest.raises(ValueError, match="BRTS needs to know which rollouts are right"):
        BRTSTrainer(
            model=make_model(), args=make_args(BRTSConfig, **SMALL), train_dataset=rows, processing_class=tokenizer
        )


def test_the_defaults_are_those_of_the_paper_and_its_script():
    own = BRTSSettings()
    # BWGZK-keke/BRTS, on_policy_distillation.sh and forward_tier2.sh; l of the paper, which the script has at 0.05 and off.
    assert (own.num_candidates, own.num_guided_candidates, own.candidate_fallback) == (2, 1, "most_similar")
    assert (own.candidate_temperature, own.candidate_top_p, own.temperature) == (0.7, 0.95, 1.0)
    assert (own.support_size, own.max_completion_length, own.num_generations, own.learning_rate) == (16, 7168, 2, 1e-6)
    assert own.candidate_weight == 10.0 and own.divergence_limits() == {"support": Support(16)}
