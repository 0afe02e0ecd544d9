# SPDX-License-Identifier: Apache-2.0
"""SDPO: the step by hand for every teacher, the ends of the logit mix, and who reads which peer or feedback."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from groups import TEXTS, ids_of, privileged
from pages import MOMENT, assert_same_step, gradients_of, moved, raw_logits, student_of, token_log_probs, whole_step
from peft import LoraConfig

from trl_opsd.methods.sdpo import peer_contexts
from trl_opsd.settings.sdpo import SDPOSettings
from trl_opsd.teacher.contexts import Rollout, Unused
from trl_opsd.trainers.sdpo import SDPOConfig, SDPOTrainer

SMALL = {"max_completion_length": 40, "num_generations": 4, "per_device_train_batch_size": 8, "support_size": 20}
MIX = {"teacher_model_kind": "base", "live_share": 0.3}


@pytest.fixture
def build(build_group, make_model):
    """A trainer whose head does not train."""

    def build(**settings):
        model = make_model(torch.float64)
        model.lm_head.requires_grad_(False)
        return build_group(SDPOTrainer, TEXTS, model=model, **{**SMALL, **settings})

    return build


def divergence_by_hand(own, target, name, k=20):
    """JSD with equal halves, or KL(q || p), over the student's k likeliest tokens and the rest, (T,)."""
    kept = own.topk(k, dim=-1).indices
    parts = []
    for logits in (own, target):
        probs = logits.softmax(-1)
        some = probs.gather(-1, kept)
        parts.append(torch.cat([some, 1 - some.sum(-1, keepdim=True)], dim=-1))
    q, p = parts
    if name == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    m = (q + p) / 2
    return ((q * (q / m).log()).sum(-1) + (p * (p / m).log()).sum(-1)) / 2


def by_hand(trainer, rows, target_of, old=None):
    """`target_of(context, completion)` gives the target's logits, `old` of each place old log-probabilities."""
    args, model, total, count = trainer.args, student_of(trainer), 0.0, 0
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        start = index // 4 * 4
        peers = [j for j in range(start, start + 4) if j != index and "boxed" in texts[j]]
        if not peers:
            continue
        blocks = args.peer_block.replace("{text}", texts[peers[0]])
        teacher = privileged(trainer, row, args.peer_prompt_template, blocks)
        own = raw_logits(model, ids_of(trainer, row["prompt"], **args.chat_template_kwargs), completion)
        values = divergence_by_hand(own, target_of(teacher, completion), args.divergence)
        if old is not None:
            ratio = (token_log_probs(own, completion).detach() - old[index]).exp().clamp(max=2.0)
            assert ratio.min() < 1 and ratio.max() == 2
            values = ratio * values
        total, count = total + values.sum(), count + len(completion)
    assert count > 0
    loss = total / count
    loss.backward()
    return loss.item(), gradients_of(model)


def logits_under(*models, shares=(1.0,)):
    def target_of(context, completion):
        return sum(
            share * raw_logits(model, context, completion).detach() for share, model in zip(shares, models, strict=True)
        )

    return target_of


def rows_of(dataset):
    return [dataset[index] for index in (0, 5) for _ in range(4)]


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("kind", ["base", "live", "ema", "mix"])
def test_a_step_equals_its_formula_from_raw_logits(build, dataset, kind, divergence):
    trainer = build(divergence=divergence, **(MIX if kind == "mix" else {"teacher_model_kind": kind}))
    first = student_of(trainer)
    moved(trainer)
    student = student_of(trainer)
    target = {
        "base": logits_under(first),
        "live": logits_under(student),
        "ema": logits_under(first),  # not updated yet
        "mix": logits_under(first, student, shares=(0.7, 0.3)),
    }[kind]
    rows = rows_of(dataset)
    tolerance = {"rel": 1e-4, "abs": 1e-6} if kind == "ema" else {}  # its values are kept in float32
    got, wanted = whole_step(trainer, rows), by_hand(trainer, rows, target)
    assert got[0] == pytest.approx(wanted[0], **(tolerance or {"rel": 1e-6}))
    assert_same_step(got, wanted, **tolerance)
    assert abs(wanted[0]) > 1e-3


@pytest.mark.parametrize(("share", "kind"), [(0.0, "base"), (1.0, "live")])
def test_the_ends_of_the_mix_are_the_frozen_and_the_live_teacher(build, dataset, share, kind):
    steps = []
    for settings in ({"teacher_model_kind": "base", "live_share": share}, {"teacher_model_kind": kind}):
        trainer = build(**settings)
        moved(trainer)
        steps.append(whole_step(trainer, rows_of(dataset)))
    assert_same_step(*steps)


def test_a_position_weighs_as_much_likelier_as_it_has_become_up_to_the_cap(build, dataset):
    trainer = build(teacher_model_kind="base")
    first, rows = student_of(trainer), rows_of(dataset)
    moved(trainer)
    trainer._buffered_inputs, trainer._step = None, 0
    trainer._prepare_inputs(list(rows))
    (batch,) = trainer._buffered_inputs
    completions = trainer._generate_single_turn([None] * 8)[0]
    student, old = student_of(trainer), []
    for row, completion in zip(rows, completions, strict=True):
        logits = raw_logits(student, ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs), completion)
        change = torch.linspace(-1.5, 1.5, len(completion), dtype=torch.float64)
        old.append(token_log_probs(logits, completion).detach() - change)
    columns = torch.zeros(8, batch["completion_ids"].size(1), dtype=torch.float64)
    for place, row in enumerate(batch["rollout_index"].tolist()):  # TRL has shuffled
        columns[place, : len(old[row])] = old[row]
    batch["old_per_token_logps"] = columns
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    long = [index for index, completion in enumerate(completions) if len(completion) > 2]
    assert long
    assert_same_step((loss.item(), gradients_of(trainer.model)), by_hand(trainer, rows, logits_under(first), old))


def test_two_micro_batches_of_four_are_one_of_eight(build, dataset):
    steps = []
    for settings in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}):
        trainer = build(**MIX, **settings)
        moved(trainer)
        steps.append(whole_step(trainer, rows_of(dataset)))
    assert_same_step(steps[1], steps[0])


def test_the_mix_of_a_lora_student_is_of_the_model_without_the_adapter_and_with_it(
    make_model, make_args, dataset, tokenizer, build_group
):
    trainer = SDPOTrainer(
        model=make_model(torch.float64),
        reward_funcs=lambda completions, **kwargs: [float("boxed" in c[0]["content"]) for c in completions],
        args=make_args(SDPOConfig, **SMALL, **MIX),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    trainer._generate_single_turn = lambda *args, **kwargs: ([[*ids, tokenizer.eos_token_id] for ids in texts], None)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    rows = rows_of(dataset)
    loss, _ = whole_step(trainer, rows)
    model = trainer.model
    model.base_model.model.__dict__.pop("forward", None)

    def target_of(context, completion):
        with torch.no_grad(), model.disable_adapter():
            base = raw_logits(model, context, completion)
        with torch.no_grad():
            return 0.7 * base + 0.3 * raw_logits(model, context, completion)

    total, count = 0.0, 0
    with torch.no_grad():
        model.eval()
        for index, ids in enumerate(texts):
            start, completion = index // 4 * 4, [*ids, tokenizer.eos_token_id]
            peers = [j for j in range(start, start + 4) if j != index and "boxed" in TEXTS[j]]
            if peers:
                blocks = trainer.args.peer_block.replace("{text}", TEXTS[peers[0]])
                teacher = privileged(trainer, rows[index], trainer.args.peer_prompt_template, blocks)
                student = ids_of(trainer, rows[index]["prompt"], **trainer.args.chat_template_kwargs)
                own = raw_logits(model, student, completion)
                total += divergence_by_hand(own, target_of(teacher, completion), "jsd").sum().item()
                count += len(completion)
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_a_head_that_trains_refuses_the_mix_and_nothing_else(build_group):
    with pytest.raises(
        ValueError, match=r"output head trains, and SDPO adds up views under the weights of \('base', 'live'\)"
    ):
        build_group(SDPOTrainer, TEXTS, **SMALL, **MIX)
    build_group(SDPOTrainer, TEXTS, **SMALL)


def views_of(rewards, feedback=None, **settings):
    group = [Rollout("x", "s", f"<think>why</think>\n\ny{index}", reward) for index, reward in enumerate(rewards)]
    group = [replace(own, note=text) for own, text in zip(group, feedback or [None] * len(group), strict=True)]
    settings = SDPOSettings(**{"peer_block": "{text}", "feedback_block": " [{text}]", **settings})
    return [[view.slot for view in views] for views in peer_contexts(group, settings, MOMENT)]


@pytest.mark.parametrize(
    ("rewards", "slots"),
    [
        ([0.0, 0.5, 1.0, 0.4], [["y1"], ["y2"], ["y1"], ["y1"]]),
        ([0.0, 1.0, 0.0], [["y1"], [], ["y1"]]),  # a lone winner has no peer
        ([0.0, 0.0], [[], []]),
        ([1.0, 1.0], [["y1"], ["y0"]]),
        ([None, 1.0], [["y1"], []]),
    ],
)
def test_the_teacher_reads_the_first_right_peer_but_the_rollouts_own_without_its_thinking(rewards, slots):
    assert views_of(rewards) == slots


@pytest.mark.parametrize(
    ("beside", "slots"),
    [
        (False, [["y1"], [" [f1]"], ["y1"], ["y1"]]),  # a lone winner reads its own feedback
        (True, [["y1 [f0]"], [" [f1]"], ["y1"], ["y1 [f3]"]]),
    ],
)
def test_feedback_is_read_where_no_peer_is_right_or_beside_it(beside, slots):
    feedback = ["f0", "f1", None, "f3"]
    assert views_of([0.0, 1.0, 0.0, 0.0], feedback, feedback_beside_peer=beside) == slots


def test_a_group_that_is_all_wrong_learns_from_feedback_alone_and_blank_feedback_is_none():
    assert views_of([0.0, 0.0], ["f0", " \n"]) == [[" [f0]"], []]


def test_thinking_stays_where_it_is_not_stripped():
    assert views_of([1.0, 0.0], strip_thinking=False) == [[], ["<think>why</think>\n\ny0"]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>a</think>\n\nb", "b"),
        ("a</think>\n\nb", "b"),  # the chat template has opened the block in the prompt
        ("a</think>b<think>c</think>d", "bd"),
        ("<think>a", "<think>a"),  # cut within its thinking
        ("b", "b"),
    ],
)
def test_thinking_is_not_shown_whoever_opened_it(text, shown):
    group = [Rollout("x", None, text, 1.0), Rollout("x", None, "y", 0.0)]
    (_, (view,)) = peer_contexts(group, SDPOSettings(peer_block="{text}"), MOMENT)
    assert view.slot == shown


def test_a_rollout_that_reads_nothing_says_why():
    group = [Rollout("x", "s", "y", 0.0)] * 2
    (first, second) = peer_contexts(group, SDPOSettings(), MOMENT)
    assert isinstance(first, Unused) and (first.reason, second.reason) == ("no right peer",) * 2


FEEDBACK = "Test 2 of 3 failed: {prompt}"


def report(rollout):
    return None if rollout.reward is None else f"{len(rollout.completion)} letters, reward {rollout.reward}"


def broken_report(rollout):
    return 3


def failing_report(rollout):
    return f"{1 / len(rollout.completion.removeprefix('no'))} a letter"  # fails on the text "no"


@pytest.fixture
def with_feedback(dataset):
    return Dataset.from_list([{**row, "feedback": FEEDBACK} for row in dataset])


def feedback_by_hand(trainer, rows, feedback_of):
    """Peers by their blocks, feedback where there is no right peer."""
    args, model, first, total, count = trainer.args, student_of(trainer), student_of(trainer), 0.0, 0
    completions = trainer._generate_single_turn([None] * 8)[0]
    texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        start = index // 4 * 4
        peers = [j for j in range(start, start + 4) if j != index and "boxed" in texts[j]]
        if peers:
            read = args.peer_block.replace("{text}", texts[peers[0]])
        else:
            read = args.feedback_block.replace("{text}", feedback_of(texts[index]))
        content = row["prompt"][-1]["content"] + read + "\n\nSolve the problem."
        teacher = ids_of(trainer, [{"role": "user", "content": content}], **args.teacher_chat_template_kwargs)
        own = raw_logits(model, ids_of(trainer, row["prompt"], **args.chat_template_kwargs), completion)
        target = raw_logits(first, teacher, completion).detach()
        total = total + divergence_by_hand(own, target, args.divergence).sum()
        count += len(completion)
    loss = total / count
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("source", ["column", "function"])
def test_a_step_with_feedback_equals_its_formula_from_raw_logits(build, with_feedback, source):
    function = None if source == "column" else "test_sdpo:report"
    trainer = build(rows=with_feedback, teacher_model_kind="live", feedback_function=function)
    moved(trainer)
    rows = rows_of(with_feedback)
    got = whole_step(trainer, rows)
    said = (lambda text: FEEDBACK) if source == "column" else (lambda text: f"{len(text)} letters, reward 1.0")
    assert_same_step(got, feedback_by_hand(trainer, rows, said))
    assert trainer._buffered_inputs[0]["distillation_mask"].any(1).all()


def test_feedback_that_is_no_text_stops_the_run_by_name(build, dataset):
    trainer = build(feedback_function="test_sdpo:broken_report")
    with pytest.raises(ValueError, match=r"feedback_function='test_sdpo:broken_report' gave 3; it must be text"):
        whole_step(trainer, rows_of(dataset))


def test_where_the_function_fails_there_is_no_feedback_and_a_warning(build, dataset):
    trainer = build(feedback_function="test_sdpo:failing_report", feedback_beside_peer=True)
    with pytest.warns(UserWarning, match=r"failed on 1 of 8 rollouts, which have no feedback.*ZeroDivisionError"):
        whole_step(trainer, rows_of(dataset))
    notes = {own.completion: own.note for own in trainer._batch.rollouts}
    assert [text for text, note in notes.items() if note is None] == ["no"] and notes["a"] == "1.0 a letter"


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
def test_as_many_tokens_as_there_are_is_the_dense_divergence(build, dataset, tokenizer, divergence):
    steps = []
    for size in (len(tokenizer), None, 20):
        trainer = build(teacher_model_kind="base", divergence=divergence, support_size=size)
        moved(trainer)
        steps.append(whole_step(trainer, rows_of(dataset)))
    assert_same_step(steps[0], steps[1])
    assert abs(steps[2][0] - steps[1][0]) > 1e-4


def test_a_token_weighs_what_the_engine_made_too_unlikely_unless_the_cap_is_none(build, dataset):
    """TRL's ratio (B, T) multiplies; here one divergence a token stands apart from the others."""
    losses = {}
    for cap in (2.0, None):
        trainer = build(teacher_model_kind="base", engine_weight_cap=cap)
        moved(trainer)
        for ratio in (None, 1.0, 0.5):
            trainer._buffered_inputs, trainer._step = None, 0
            trainer._prepare_inputs(rows_of(dataset))
            (batch,) = trainer._buffered_inputs
            if ratio is not None:
                batch["importance_sampling_ratio"] = torch.full(batch["completion_ids"].shape, ratio)
            losses[cap, ratio] = trainer.compute_loss(trainer.model, batch).item()
    for alike in ((2.0, None), (None, None), (None, 0.5)):  # two forwards may differ in the last bit
        assert losses[alike] == pytest.approx(losses[2.0, 1.0], rel=1e-12)
    assert losses[2.0, 0.5] == pytest.approx(losses[2.0, 1.0] / 2, rel=1e-12)


def test_the_defaults_are_those_of_the_papers_runs_without_feedback(make_args):
    args = make_args(SDPOConfig, per_device_train_batch_size=8, max_completion_length=8192)
    # lasgroup/SDPO, and arXiv 2601.20802: FAMILY_A 1, "No feedback".
    divergence = args.loss_divergence()
    assert (divergence.name, divergence.mixture_weight, divergence.clip) == ("jsd", 0.5, None)
    assert (divergence.support.k, divergence.support.of, divergence.support.remainder) == (100, "student", "tail")
    assert (args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps) == ("ema", 0.05, None)
    assert (args.importance_cap, args.engine_weight_cap, args.reward_threshold) == (2.0, 2.0, 0.5)
    assert (args.learning_rate, args.num_generations, args.temperature) == (1e-5, 8, 1.0)
    assert args.strip_thinking and not args.feedback_beside_peer and args.reward_weight == 0
    assert args.chat_template_kwargs == args.teacher_chat_template_kwargs == {"enable_thinking": False}


def test_rows_without_a_peer_change_neither_sum_nor_count(build, dataset):
    trainer = build()
    whole_step(trainer, rows_of(dataset))
    (batch,) = trainer._buffered_inputs
    trained = batch["distillation_mask"].any(1)
    assert batch["num_loss_items"] == batch["completion_mask"][trained].sum()
    assert 0 < trained.sum() < 8


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"live_share": 1.5, "teacher_model_kind": "base"}, "live_share=1.5"),
        ({"live_share": 0.1}, "live_share=0.1 with teacher_model_kind='ema'"),
        ({"support_size": 0}, "support_size=0"),
        ({"importance_cap": 0.0}, "importance_cap=0.0"),
        ({"num_generations": 1}, "num_generations=1"),
        ({"engine_weight_cap": 0.0}, "engine_weight_cap=0.0"),
        ({"max_rollout_context_length": 0}, "max_rollout_context_length=0"),
        ({"feedback_function": "length"}, "feedback_function='length' is not `module:function`"),
        ({"feedback_function": "math:length"}, "feedback_function='math:length' is not `module:function`.*length"),
        ({"feedback_function": "math:pi"}, "feedback_function='math:pi' is a float; name a function of a rollout"),
        ({"peer_prompt_template": "{prompt}"}, "peer_prompt_template does not contain {solution}"),
        ({"peer_block": "so"}, "peer_block does not contain {text}"),
        ({"feedback_block": "so"}, "feedback_block does not contain {text}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(SDPOConfig, **{**SMALL, **bad})


def test_another_temperature_of_the_loss_is_refused_where_the_old_policy_is_read(build_group, dataset):
    with pytest.raises(ValueError, match=r"loss_temperature=2.0 with temperature=1.0: SDPO compares"):
        build_group(SDPOTrainer, rows=dataset, num_generations=4, loss_temperature=2.0, max_completion_length=40)
