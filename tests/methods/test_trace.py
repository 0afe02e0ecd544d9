# SPDX-License-Identifier: Apache-2.0
"""TRACE: the schedule, spans by token, the step by hand beside GRPO, GRPO and OPSD as its ends, and annotations that fail."""

import pytest
import torch
from datasets import Dataset
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
from trl_opsd.experimental.trace.method import TRACE, span_marks, strength, typed_contexts
from trl_opsd.experimental.trace.trainer import TRACEConfig, TRACETrainer
from trl_opsd.losses import held_then_falling
from trl_opsd.rows.spans import read_spans
from trl_opsd.teacher.contexts import Moment, Rollout
from trl_opsd.teacher.forwards import TeacherForward

TEXTS = (
    "1+2=3 then",
    "so it is \\boxed{3}",
    "wait, 10 it is",
    "a",
    "it is \\boxed{10} then",
    "no",
    "so it is 5",
    "\\boxed{6}",
)
SMALL = {"max_completion_length": 40, "num_generations": 4, "per_device_train_batch_size": 8}
ROUNDED = {"rel": 1e-5, "abs": 1e-7}  # TRL's advantages are float32
HERE = "test_trace"
# Of each text the places that are marked, the kind, and the type.
SPANS = {
    TEXTS[1]: [(3, 5, "K", "a claim")],
    TEXTS[2]: [(0, 3, "E", "a doubt"), (12, 14, "E", "a slip")],
    TEXTS[4]: [(0, 2, "K", "a claim"), (6, 8, "K", "a sum")],
}


def annotate(rollout):
    return SPANS.get(rollout.completion, [])


def nothing(rollout):
    return []


def everything(rollout):
    """All of the text, and the end token's place is behind it."""
    return [(0, len(rollout.completion), "K", "all")]


def fails(rollout):
    if rollout.completion == "a":
        raise ConnectionError("no annotator")
    return "no list" if rollout.completion == "no" else annotate(rollout)


@pytest.fixture
def build(build_group):
    def build(trainer_class=TRACETrainer, texts=TEXTS, **settings):
        own = {"annotator_function": f"{HERE}:annotate"} if trainer_class is TRACETrainer else {}
        return build_group(trainer_class, texts, **{**SMALL, "temperature": 1.3, **own, **settings})

    return build


def at_step(trainer, step):
    trainer.state.global_step = step
    return trainer


def groups_of(rows):
    return [rows[index] for index in (0, 5) for _ in range(4)]


def encode(trainer, text):
    return [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]


def on_spans(trainer, text, kind):
    """Of each token 1 where it holds a character of a span of a kind."""
    flags, start = [], 0
    for token in encode(trainer, text):
        piece = trainer.tokenizer.decode([token], skip_special_tokens=True)
        inside = [
            first <= start + place < last
            for first, last, own, _ in SPANS.get(text, ())
            if own == kind
            for place in range(len(piece))
        ]
        flags.append(float(any(inside)))
        start += len(piece)
    return flags


def term_by_hand(trainer, model, teacher_model, row, text, kind):
    """Sum over the spans of a text of the clipped divergence, over its length."""
    args, completion, flags = trainer.args, encode(trainer, text), torch.tensor(on_spans(trainer, text, kind))
    student = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
    types = ", ".join(dict.fromkeys(name for *_, own, name in SPANS[text] if own == kind))
    shown = args.type_prompt_template.replace("{prompt}", row["prompt"][-1]["content"]).replace("{type}", types)
    teacher = ids_of(trainer, [{"role": "user", "content": shown}], **args.teacher_chat_template_kwargs)
    log_q = (raw_logits(model, student, completion) / args.temperature).log_softmax(-1)
    log_p = (raw_logits(teacher_model, teacher, completion).detach() / args.temperature).log_softmax(-1)
    forward, reverse = log_p.exp() * (log_p - log_q), log_q.exp() * (log_q - log_p)
    terms = (forward if kind == "K" else reverse).clamp(max=0.05).sum(-1)
    return (flags * terms).sum() / len(completion)


@pytest.mark.parametrize(
    ("kind", "settings", "used"),
    [
        ("K", {}, {1: 0, 4: 4}),
        ("E", {"distilled_spans": "error", "divergence": "reverse_kl", "max_span_share": 0.5}, {2: 0}),
    ],
    ids=["key spans, forward", "error spans, reverse"],
)
@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (25, 0.5)])
def test_a_step_is_grpo_relieved_on_spans_plus_the_divergence_there(build, dataset, kind, settings, used, step, share):
    trainer = build(
        span_weight=0.8,
        max_span_share=0.5,
        teacher_model_kind="base",
        **{k: v for k, v in settings.items() if k != "max_span_share"},
    )
    first = student_of(trainer)
    at_step(moved_(trainer), step)
    rows, model = groups_of(dataset), student_of(trainer)
    got = whole_step(trainer, rows)
    factors = [
        [1 - share * flag for flag in on_spans(trainer, text, kind)]
        if index in used
        else [1.0] * len(encode(trainer, text))
        for index, text in enumerate(TEXTS)
    ]
    value, surrogate = grpo_by_hand(trainer, model, rows, factors)
    terms = [term_by_hand(trainer, model, first, rows[index], TEXTS[index], kind) for index in used]
    term = 0.8 * share * sum(terms) / 8
    (surrogate + term).backward()
    wanted = (value.item() + term.item(), gradients_of(model))
    assert got[0] == pytest.approx(wanted[0], **ROUNDED) and term.item() > 1e-4
    assert_same_step((wanted[0], got[1]), wanted)


def moved_(trainer):
    moved(trainer)
    return trainer


def assert_grpo(got, trainer, model, rows):
    value, surrogate = grpo_by_hand(trainer, model, rows)
    surrogate.backward()
    assert got[0] == pytest.approx(value.item(), **ROUNDED)
    assert_same_step((0.0, got[1]), (0.0, gradients_of(model)))


@pytest.mark.parametrize("end", ["no spans", "schedule over"])
def test_without_spans_or_after_the_schedule_it_is_grpo_and_nobody_is_asked(build, dataset, monkeypatch, end):
    asked, forwards, run = [], [], TeacherForward.__call__
    monkeypatch.setattr(TeacherForward, "__call__", lambda *given, **rest: (forwards.append(1), run(*given, **rest))[1])
    name, step = ("nothing", 0) if end == "no spans" else ("annotate", 40)
    trainer = build(annotator_function=f"{HERE}:{name}")
    monkeypatch.setattr(f"{HERE}.{name}", lambda rollout: asked.append(rollout) or [])
    at_step(moved_(trainer), step)
    rows, model = groups_of(dataset), student_of(trainer)
    assert_grpo(whole_step(trainer, rows), trainer, model, rows)
    reason = end.replace(" ", "_").rstrip("s") if end == "no spans" else "schedule_over"
    assert trainer._metrics["train"][f"rows/{reason}"] == [1.0]
    assert not forwards and len(asked) == (8 if end == "no spans" else 0)


def test_the_end_of_the_schedule_is_nothing_to_warn_of(build, dataset):
    trainer = build()
    at_step(trainer, 40)
    for _ in range(11):
        whole_step(trainer, groups_of(dataset))  # a warning would fail
    assert trainer._metrics["train"]["rows/used"] == [0.0] * 11


def test_where_all_is_a_span_it_is_w0_times_clipped_opsd_by_sequences(build, dataset, monkeypatch):
    texts = ("1+2=3 then", "so \\boxed{3}", "wait, 10 it is", "a")
    # The end token too.
    monkeypatch.setattr("trl_opsd.experimental.trace.spans.token_marks", lambda spans, ends: [1.0] * len(ends))
    rows, steps = [dataset[5]] * 4, []
    for trainer_class, settings in (
        (
            TRACETrainer,
            {
                "annotator_function": f"{HERE}:everything",
                "max_span_share": 1.0,
                "teacher_model_kind": "base",
                "type_prompt_template": "{prompt} of {type}",
                "span_weight": 0.6,
            },
        ),
        (
            OPSDTrainer,
            {
                "teacher_prompt_template": "{prompt} of all{solution}",
                "loss_reduction": "sequence",
                "num_generations": 1,
                "chat_template_kwargs": {"enable_thinking": True},
            },
        ),
    ):
        trainer = build(trainer_class, texts, **{"per_device_train_batch_size": 4, **settings})
        moved(trainer)
        if trainer_class is OPSDTrainer:
            trainer.scorer.collator.templates["teacher"] = "{prompt} of all"
        steps.append(whole_step(trainer, rows))
    (loss, gradients), (opsd, of_opsd) = steps
    assert_same_step((loss, gradients), (0.6 * opsd, {name: 0.6 * gradient for name, gradient in of_opsd.items()}))


def test_lambda_is_held_and_falls_to_zero(make_args):
    args = make_args(TRACEConfig, **SMALL, annotator_function=f"{HERE}:annotate")
    shares = {step: strength(args, step) for step in (0, 9, 10, 25, 39, 40, 400)}
    assert shares == pytest.approx({0: 1, 9: 1, 10: 1, 25: 0.5, 39: 1 / 30, 40: 0, 400: 0})
    assert held_then_falling(25, largest=0.5, hold=10, fall=30) == 0.25  # the paper's lambda at step 25
    assert held_then_falling(40, largest=0.5, hold=10, fall=30) == 0


class SETTINGS:
    distilled_spans, max_span_share, span_hold_steps, span_fall_steps = "key", 0.25, 10, 30


def marked(length, *spans):
    """A rollout of one-letter tokens."""
    return Rollout("x", None, "y" * length, 1.0, length, token_ends=tuple(range(1, length + 1)), note=spans)


def test_a_token_that_a_span_touches_belongs_to_it():
    rollout = Rollout("x", None, "ab cd ef", 1.0, 4, token_ends=(2, 5, 8, 8), note=((3, 4, "K", "t"), (7, 8, "E", "t")))
    assert span_marks([rollout], SETTINGS, MOMENT) == [[0.0, 1.0, -1.0, 0.0]]
    assert span_marks([Rollout("x", None, "ab", token_ends=(1, 2))], SETTINGS, MOMENT) == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("rollout", "reason"),
    [
        (marked(8), "no span"),
        (marked(8, (0, 1, "E", "t")), "no span"),  # error spans are left to GRPO
        (marked(8, (0, 3, "K", "t")), "spans too long"),
        (marked(8, (0, 2, "K", "t"), (4, 5, "E", "t")), "spans too long"),  # both kinds count
        (Rollout("x", None, "y", note=ValueError("x")), "annotation failed"),
        (Rollout("x", None, "y", note=None), "no span"),
    ],
)
def test_a_rollout_that_is_left_to_grpo_says_why(rollout, reason):
    (views,) = typed_contexts([rollout], SETTINGS, MOMENT)
    assert views == () and views.reason == reason
    (views,) = typed_contexts([rollout], SETTINGS, Moment(MOMENT.draw, 40))
    assert views.reason == "schedule over" and views.planned


def test_the_teacher_reads_the_types_of_distilled_spans_and_no_text_of_the_rollout():
    rollout = marked(16, (0, 1, "K", "a slip"), (2, 3, "K", "a sum"), (5, 6, "K", "a slip"), (8, 9, "E", "other"))
    ((view,),) = typed_contexts([rollout], SETTINGS, MOMENT)
    assert view.texts == (("type", "a slip, a sum"),) and view.slot is None and view.anchor == 1


@pytest.mark.parametrize(
    "found",
    [
        [{"start": 0, "end": 1, "kind": "K"}],
        "no list",
        7,
        [(0, 1, "K")],
        [(1, 1, "K", "t")],
        [(0, 9, "K", "t")],
        [(-1, 2, "K", "t")],
        [(0, 1, "X", "t")],
        [(0, 1, "K", " ")],
    ],
)
def test_what_is_no_list_of_spans_in_the_text_is_a_failed_annotation(found):
    assert isinstance(read_spans(found, 8), ValueError)
    assert read_spans([["0", 2, "E", "t"]], 8) == ((0, 2, "E", "t"),) and read_spans(None, 8) == ()


def test_failed_annotations_are_counted_and_the_run_goes_on(build, dataset):
    trainer = build(annotator_function=f"{HERE}:fails")
    with pytest.warns(
        UserWarning,
        match=r"annotator_function='test_trace:fails' failed on \d of \d rollouts, which are counted.*ConnectionError",
    ):
        whole_step(trainer, groups_of(dataset))
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rows/")}
    assert logged == {"rows/used": 0.25, "rows/annotation_failed": 0.25, "rows/no_span": 0.5}


def test_spans_may_be_a_column(build, dataset, build_group):
    spans = [{"start": 0, "end": 1, "kind": "K", "type": "t"}]
    rows = Dataset.from_list([{**row, "spans": spans} for row in dataset])
    with pytest.raises(ValueError, match="train_dataset has no column `spans`, which TRACE reads"):
        build(annotator_function=None)
    trainer = build_group(TRACETrainer, ("it is so", "\\boxed{3} it is"), rows, **SMALL)
    whole_step(trainer, groups_of(rows))
    assert all(rollout.note == ((0, 1, "K", "t"),) for rollout in trainer._batch.rollouts)
    assert trainer._buffered_inputs[0]["distillation_mask"].any(dim=1).all()


def test_two_micro_batches_of_four_are_one_of_eight(build, dataset):
    steps = []
    for settings in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}):
        trainer = build(teacher_model_kind="base", **settings)
        moved(trainer)
        steps.append(whole_step(trainer, groups_of(dataset)))
    assert_same_step(steps[1], steps[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"distilled_spans": "all"}, "distilled_spans='all'"),
        ({"span_weight": -1.0}, "span_weight=-1.0"),
        ({"span_hold_steps": -1}, "span_hold_steps=-1"),
        ({"span_fall_steps": 0}, "span_fall_steps=0"),
        ({"max_span_share": 0.0}, "max_span_share=0.0"),
        ({"annotator_function": "nowhere:at_all"}, "annotator_function='nowhere:at_all' is not `module:function`"),
        ({"type_prompt_template": "{prompt}"}, "type_prompt_template does not contain {type}"),
        ({"num_generations": 1}, "num_generations=1"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(TRACEConfig, **{**SMALL, **bad})


def test_the_papers_numbers_are_the_defaults():
    args = TRACEConfig("out", bf16=False, use_cpu=True)
    # arXiv 2605.10194 as noted: w_0 .5 for 10 steps, to 0 over 30, a quarter at most, clip .05, DAPO's .2 and .28, a copy every 10 steps.
    assert (args.span_weight, args.span_hold_steps, args.span_fall_steps, args.max_span_share) == (0.5, 10, 30, 0.25)
    assert (args.divergence, args.clip, args.clip_value) == ("forward_kl", "upper", 0.05)
    assert (args.epsilon, args.epsilon_high, args.reward_weight) == (0.2, 0.28, 1.0)
    assert (args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps) == ("ema", 1.0, 10)
    assert args.chat_template_kwargs == args.teacher_chat_template_kwargs == {"enable_thinking": True}
    assert TRACE.inferred
