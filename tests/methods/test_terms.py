# SPDX-License-Identifier: Apache-2.0
"""Two divergences in a step, each on sequences, target and support of its own: their sum, by hand and from the single calls."""

import math
from dataclasses import replace

import pytest
import torch
from groups import EXACT, ids_of, privileged
from pages import assert_same_step, gradients_of, moved, raw_logits, student_of, whole_step
from two_terms import WEIGHT, K, TwoTerms, beside, likeliest

from trl_opsd import OPSDConfig
from trl_opsd.methods import Term
from trl_opsd.teacher import states
from trl_opsd.teacher.contexts import TeacherContext

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
HEAT = 1.3
SMALL = {"temperature": HEAT, "max_completion_length": 30, "clip": None, "divergence": "reverse_kl"}


def with_method(**changes):
    return type("Changed", (TwoTerms,), {"method": replace(TwoTerms.method, **changes)})


@pytest.fixture
def build(build_group):
    def build(trainer_class=TwoTerms, **settings):
        return build_group(trainer_class, TEXTS, **{**SMALL, **settings})

    return build


@pytest.fixture
def rows(dataset):
    return [dataset[index] for index in range(4)]


def solution_ids(trainer, row):
    ids = trainer.tokenizer(row["solution"], add_special_tokens=False)["input_ids"]
    return [*ids, trainer.tokenizer.eos_token_id][: trainer.max_completion_length]


def pairs(trainer, model, teacher, rows):
    """Log-probabilities (T, V) of student and teacher on each rollout, and on the solution beside it or None."""
    for row, rollout in zip(rows, trainer._generate_single_turn([None] * len(rows))[0], strict=True):
        own = ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
        shown = privileged(trainer, row, trainer.args.teacher_prompt_template, row["solution"])
        extra = None if "boxed" in trainer.tokenizer.decode(rollout) else solution_ids(trainer, row)
        yield tuple(
            ids
            and (
                (raw_logits(model, own, ids) / HEAT).log_softmax(-1),
                (raw_logits(teacher, shown, ids) / HEAT).log_softmax(-1).detach(),
            )
            for ids in (rollout, extra)
        )


def reverse(log_q, log_p):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def forward_on_likeliest(log_q, log_p):
    places = log_p.topk(K).indices
    log_q, log_p = (log.gather(-1, places).log_softmax(-1) for log in (log_q, log_p))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def by_hand(trainer, teacher, rows, reduction="token", weight=WEIGHT):
    model, sums = student_of(trainer), []
    for rollout, extra in pairs(trainer, model, teacher, rows):
        sums.append((reverse(*rollout), None if extra is None else forward_on_likeliest(*extra)))
    parts = [[own for own, _ in sums], [other for _, other in sums if other is not None]]
    means = [
        torch.cat(terms).mean() if reduction == "token" else sum(term.mean() for term in terms) / len(terms)
        for terms in parts
    ]
    loss = means[0] + weight * means[1]
    loss.backward()
    return (loss.item(), gradients_of(model)), [mean.item() for mean in means]


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["base", "live"])
def test_a_step_is_the_sum_of_both_divergences_by_hand(build, rows, kind, reduction):
    trainer = build(teacher_model_kind=kind, loss_reduction=reduction)
    first = student_of(trainer)
    moved(trainer)
    teacher = first if kind == "base" else student_of(trainer)
    wanted, means = by_hand(trainer, teacher, rows, reduction)
    assert_same_step(whole_step(trainer, rows), wanted)
    assert min(means) > 1e-3
    (batch,) = trainer._buffered_inputs
    assert batch["extra_mask"].any(1).sum() == 3


def test_a_step_is_the_sum_of_the_single_steps(build, rows):
    """The main divergence alone, and the term alone (the rollouts' weighed with 0)."""
    steps = []
    nothing = Term(weight=lambda settings: 0.0, divergence=likeliest)
    for changes in ({"extra_term": nothing}, {"token_weight": lambda facts, *_: 0 * facts.divergence}, {}):
        trainer = build(with_method(**changes))
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    total = {name: steps[0][1][name] + steps[1][1][name] for name in steps[0][1]}
    assert_same_step(steps[2], (steps[0][0] + steps[1][0], total), rel=1e-12)
    assert min(step[0] for step in steps) > 1e-3
    alone = build(with_method(extras=None, extra_term=None))
    moved(alone)
    assert_same_step(whole_step(alone, rows), steps[0], rel=1e-12)


def test_micro_batches_of_which_one_has_no_extra_are_one_of_four(build, rows):
    steps = []
    for size, splits in ((4, 1), (2, 2), (1, 4)):
        trainer = build(per_device_train_batch_size=size, gradient_accumulation_steps=splits)
        moved(trainer)
        steps.append(whole_step(trainer, rows))
    assert [batch["extra_mask"].any().item() for batch in trainer._buffered_inputs].count(False) == 1
    for step in steps[1:]:
        assert_same_step(step, steps[0])


def test_a_loss_of_the_extras_tokens_has_its_own_facts(build, rows):
    """The negative log-likelihood of the solution, beside a loss of facts on rollouts; neither sees the other."""
    seen = []

    def own(facts, settings, moment):
        seen.append(facts.extra)
        return facts.divergence.square()

    def likelihood(facts, settings, moment):
        seen.append(facts.divergence)
        return -facts.log_prob

    term = Term(weight=lambda settings: WEIGHT, loss=likelihood)
    bare = lambda *args: [extra and extra._replace(contexts=()) for extra in beside(*args)]  # noqa: E731
    trainer = build(with_method(loss=own, extras=bare, extra_term=term))
    first = student_of(trainer)
    moved(trainer)
    model, terms, likelihoods = student_of(trainer), [], []
    ids = [solution_ids(trainer, row) for row in rows]
    for (rollout, extra), solution in zip(pairs(trainer, model, first, rows), ids, strict=True):
        terms.append(reverse(*rollout).square())
        if extra is not None:
            likelihoods.append(-extra[0].gather(-1, torch.tensor(solution)[:, None]).squeeze(-1))
    loss = torch.cat(terms).mean() + WEIGHT * torch.cat(likelihoods).mean()
    loss.backward()
    assert_same_step(whole_step(trainer, rows), (loss.item(), gradients_of(model)))
    assert seen == [None, None]


def test_the_log_has_the_terms_mean_over_tokens_and_keeps_it_in_the_middle_of_an_interval(build, rows):
    trainer = build()
    first = student_of(trainer)
    moved(trainer)
    _, means = by_hand(trainer, first, rows)
    whole_step(trainer, rows)
    diagnostics, device = trainer.diagnostics["train"], trainer.accelerator.device
    state = diagnostics.state()
    logged = diagnostics.means(lambda sums: sums, device)
    assert logged["extras/loss"] == pytest.approx(means[1], **EXACT)
    assert logged["divergence"] == pytest.approx(means[0], **EXACT)
    diagnostics.restore(state, device)
    assert diagnostics.means(lambda sums: sums, device) == pytest.approx(logged, rel=1e-12)


def test_without_a_target_of_rollouts_the_extras_still_have_one(build, rows):
    method = {"loss": lambda facts, *_: facts.log_prob, "has_target": False, "reads_views": True}
    contexts = lambda group, *_: [(TeacherContext("plain", None, read=1.0),) for _ in group]  # noqa: E731
    trainer = build(with_method(contexts=contexts, **method))
    first = student_of(trainer)
    moved(trainer)
    model, own, other = student_of(trainer), [], []
    rollouts = trainer._generate_single_turn([None] * 4)[0]
    for (rollout, extra), ids in zip(pairs(trainer, model, first, rows), rollouts, strict=True):
        own.append(rollout[0].gather(-1, torch.tensor(ids)[:, None]).squeeze(-1))
        other += [] if extra is None else [forward_on_likeliest(*extra)]
    loss = torch.cat(own).mean() + WEIGHT * torch.cat(other).mean()
    loss.backward()
    assert_same_step(whole_step(trainer, rows), (loss.item(), gradients_of(model)))


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_a_target_of_the_initial_weights_beside_another_teacher_is_read_with_their_head(build, rows, kind):
    """The head trains, so the teacher's would be another one."""

    class Config(OPSDConfig):
        teacher_owner = "base"

    def contexts(group, settings, moment):
        view = TeacherContext("teacher", group[0].solution, anchor=1.0, weights="base")
        return [(view, TeacherContext("plain", None, read=1.0))] * len(group)

    owners = {"owners": lambda settings: ("base",), "target_owner": "base", "reads_views": True}
    kept = with_method(contexts=contexts, **owners)
    kept.config_class = Config
    trainer = build(kept, teacher_model_kind=kind)
    first = student_of(trainer)
    moved(trainer)
    trainer.teacher.update()
    wanted, _ = by_hand(trainer, first, rows)
    assert_same_step(whole_step(trainer, rows), wanted)


def test_the_student_reads_a_further_row_for_each_extra_alone(build, rows, monkeypatch):
    trainer, seen = build(per_device_train_batch_size=2, gradient_accumulation_steps=2), []
    forward = trainer.method_loss.in_forward
    monkeypatch.setattr(
        trainer.method_loss, "in_forward", lambda model, ids, *rest: seen.append(len(ids)) or forward(model, ids, *rest)
    )
    whole_step(trainer, rows)
    assert sorted(seen) == [3, 4]  # three of four rollouts have a solution beside them
    none = build(with_method(extras=lambda group, *_: [None] * len(group)))
    loss, gradient = whole_step(none, rows)
    alone = build(with_method(extras=None, extra_term=None))
    assert_same_step((loss, gradient), whole_step(alone, rows), rel=1e-12)


def test_the_extras_target_waits_in_host_memory_with_the_others(build, rows, monkeypatch):
    trainer, steps = build(), []
    bytes_each = 8 * trainer.scorer.hidden_size * 4
    for limit in (states.DEVICE_BYTES, 0, bytes_each * 13):
        monkeypatch.setattr(states, "DEVICE_BYTES", limit)
        steps.append(whole_step(trainer, rows))
    assert_same_step(steps[1], steps[0], rel=1e-12)
    maker = trainer.targets
    assert maker._wait_on_host(4, 8, 6) and not maker._wait_on_host(4, 8, 5) and not maker._wait_on_host(4, 13)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_owner": "live"}, r"weights='teacher', and target_owner is 'live'"),
        (
            {"extra_term": Term(lambda settings: 1.0, loss=lambda facts, *_: -facts.log_prob)},
            "only where extra_term has",
        ),
        ({"extra_term": Term(lambda settings: 1.0, likeliest, lambda facts, *_: facts.divergence.sum(-1))}, "terms"),
    ],
    ids=["owner", "no divergence", "shape"],
)
def test_what_a_method_says_wrongly_is_refused_by_name(build, rows, changes, told):
    trainer = build(with_method(**changes, owners=lambda settings: ("live",)))
    with pytest.raises(ValueError, match=told):
        whole_step(trainer, rows)


def test_a_term_needs_extras_and_something_to_measure():
    for changes in ({"extras": None}, {"extra_term": Term(lambda settings: 1.0)}):
        with pytest.raises(ValueError, match="extra_term needs extras, and a divergence or a loss"):
            replace(TwoTerms.method, **changes)
    assert math.isfinite(WEIGHT)
