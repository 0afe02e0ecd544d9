# SPDX-License-Identifier: Apache-2.0
"""The tail anchor of OGLS-SD: the whole step equals a hand computation, wherever the tail lies; off, it does nothing."""

import pytest
import test_contract_groups as groups
import torch

from trl_opsd import OGLSSDConfig
from trl_opsd.contexts import Rollout
from trl_opsd.losses import token_divergence
from trl_opsd.methods.ogls_sd import short_right_tails
from trl_opsd.trainers.tail_anchor import student_length, tail_mask

build = groups.build  # a fixture
ANCHOR = {"tail_anchor_weight": 0.7, "tail_anchor_length": 4}
STEP = {"num_generations": 4, "gradient_accumulation_steps": 2, "steering_warmup_steps": 0, "clip": None}


def rows_of(dataset):
    return [dataset[index] for index in (0, 5) for _ in range(4)]


def student_logits(trainer, model, row, completion):
    context = groups.ids_of(trainer, row["prompt"], **trainer.args.chat_template_kwargs)
    return model(input_ids=torch.tensor([context + completion]), use_cache=False).logits[0, len(context) - 1 : -1]


def negative_log_likelihood(trainer, model, rows, completions, tails):
    """Mean over the last tokens of the rollouts in `tails` (index to length), at temperature 1."""
    terms = []
    for index, length in tails.items():
        log_q = student_logits(trainer, model, rows[index], completions[index]).log_softmax(-1)
        ids = torch.tensor(completions[index])
        terms.append(-log_q.gather(1, ids[:, None])[-length:, 0])
    return torch.cat(terms).mean()


def distillation(trainer, model, rows, completions):
    """The steered loss of the whole step, with a gradient to `model`."""
    total, count, args = 0.0, 0, trainer.args
    for index, text in enumerate(groups.TEXTS):
        if "boxed" in text:
            continue
        row, texts = rows[index], groups.TEXTS[index // 4 * 4 : index // 4 * 4 + 4]
        completion = completions[index][: args.distillation_length]

        def mean(pool, row=row, completion=completion):
            contexts = [groups.privileged(trainer, row, args.teacher_prompt_template, text) for text in pool]
            return sum(groups.logits_of(model, context, completion) for context in contexts) / len(pool)

        right = mean([text for text in texts if "boxed" in text] + [row["solution"]])
        wrong = mean([text for text in texts if "boxed" not in text])
        student = student_logits(trainer, model, row, completion)
        target = student.detach() + 3.0 * (right - wrong)
        total = total + token_divergence(student, target, temperature=args.temperature).sum()
        count += len(completion)
    return total / count


@pytest.mark.parametrize("distilled", [2, 6, None], ids=["behind", "across", "inside"])
def test_loss_and_gradient_of_a_step_with_the_anchor_equal_a_hand_computation(build, dataset, distilled):
    trainer, rows = build(**STEP, **ANCHOR, distillation_length=distilled), rows_of(dataset)
    model = groups.bare(trainer)
    loss = groups.loss_of_step(trainer, rows)
    loss.backward()
    completions = trainer._generate_single_turn([None] * 8)[0]
    # Right are 1 and 3 of the first group, 7 of the second; 3 is longer than the median of 1 and 3.
    assert len(completions[3]) > len(completions[1]) > 2 + 4
    hand = distillation(trainer, model, rows, completions)
    hand = hand + 0.7 * negative_log_likelihood(trainer, model, rows, completions, {1: 4, 7: 4})
    hand.backward()
    assert loss.item() == pytest.approx(hand.item(), **groups.EXACT)
    for (name, ours), (_, theirs) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_anchor_enters_the_policy_gradient_step_alike(build, dataset):
    rows, losses = rows_of(dataset), {}
    for weight in (0.0, 0.7):
        trainer = build(**STEP, **ANCHOR | {"tail_anchor_weight": weight}, reward_weight=0.5)
        model = groups.bare(trainer)
        trainer.current_gradient_accumulation_steps = 2
        losses[weight] = groups.loss_of_step(trainer, rows).item()
    completions = trainer._generate_single_turn([None] * 8)[0]
    hand = 0.7 * negative_log_likelihood(trainer, model, rows, completions, {1: 4, 7: 4}).item()
    assert losses[0.7] - losses[0.0] == pytest.approx(hand, **groups.EXACT)


def test_one_by_four_equals_two_by_two_accumulation_with_the_anchor(build, make_model):
    weights = []
    texts = ("\\boxed{3}", "a \\boxed{3}", "so it is \\boxed{4}", "no")  # two are short, of unequal length
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = build(
            **STEP | {"gradient_accumulation_steps": steps},
            **ANCHOR | {"tail_anchor_length": 100},
            texts=texts,
            per_device_train_batch_size=batch_size,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=1e9,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        entry = trainer.state.log_history[0]
        assert entry["tail_anchor/rollouts"] == 0.5 and entry["tail_anchor/negative_log_likelihood"] > 0
    start = torch.cat([p.detach().flatten() for p in make_model(torch.float64).parameters()])
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


def test_the_logged_likelihood_is_that_of_the_anchored_tokens(build, dataset):
    trainer, rows = build(**STEP, **ANCHOR), rows_of(dataset)
    model = groups.bare(trainer)
    groups.loss_of_step(trainer, rows)
    completions = trainer._generate_single_turn([None] * 8)[0]
    logged = trainer.diagnostics["train"].means(lambda sums: sums, trainer.accelerator.device)
    hand = negative_log_likelihood(trainer, model, rows, completions, {1: 4, 7: 4}).item()
    assert logged["tail_anchor/negative_log_likelihood"] == pytest.approx(hand, **groups.EXACT)


def test_switched_off_the_anchor_leaves_batch_and_loss_bit_for_bit(build, dataset):
    rows, losses = rows_of(dataset), []
    for settings in ({}, {"tail_anchor_weight": 0.0, "tail_anchor_length": 3}):
        trainer = build(**STEP, **settings)
        torch.manual_seed(0)  # TRL's shuffle
        losses.append(groups.loss_of_step(trainer, rows))
        for batch in trainer._buffered_inputs:
            assert not {"tail_mask", "num_tail_tokens"} & batch.keys()
            assert student_length(batch) == batch["distillation_mask"].size(1) == 6
    assert torch.equal(*losses)


@pytest.mark.parametrize("texts", [("no", "a wrong one"), ("\\boxed{1}",)], ids=["none right", "all right"])
def test_an_anchor_without_right_or_without_wrong_rollouts(build, dataset, texts):
    rows, losses = [dataset[0]] * 4, []
    for anchor in ({}, ANCHOR):
        trainer = build(**STEP, **anchor, texts=texts, per_device_train_batch_size=2)
        torch.manual_seed(0)
        losses.append(groups.loss_of_step(trainer, rows))
        losses[-1].backward()
    if "no" in texts:
        assert torch.equal(*losses) and losses[0].item() > 0
        return
    completions = trainer._generate_single_turn([None] * 4)[0]
    hand = negative_log_likelihood(trainer, groups.bare(trainer), rows, completions, dict.fromkeys(range(4), 4))
    assert losses[0].item() == 0 and losses[1].item() == pytest.approx(0.7 * hand.item(), **groups.EXACT)


def test_a_right_rollout_that_was_cut_at_the_limit_is_not_anchored(build, dataset):
    texts = ("so \\boxed{3}", "\\boxed{10} and on and on and on", "no", "a")
    trainer = build(**STEP, **ANCHOR | {"tail_anchor_length": 100}, texts=texts, max_completion_length=16)
    rows = [dataset[0]] * 4
    groups.loss_of_step(trainer, rows)
    anchored = {}
    for batch in trainer._buffered_inputs:
        anchored |= dict(zip(batch["rollout_index"].tolist(), batch["tail_mask"].sum(1).tolist(), strict=True))
    completions = trainer._generate_single_turn([None] * 4)[0]
    assert len(completions[1]) == 16 and anchored == {0: len(completions[0]), 1: 0, 2: 0, 3: 0}


@pytest.mark.parametrize(
    ("rollouts", "lengths"),
    [
        ([(1, 10, True), (1, 30, True), (1, 20, True), (0, 5, True)], [8, 0, 8, 0]),
        ([(1, 10, True), (1, 20, True)], [8, 0]),
        ([(1, 3, True), (0, 1, True)], [3, 0]),
        ([(1, 10, False), (1, 30, True), (1, 20, True)], [0, 0, 8]),
        ([(1, 10, False), (None, 10, True), (0, 10, True)], [0, 0, 0]),
        ([(None, 10, True), (None, 10, True)], [0, 0]),
    ],
    ids=["median of three", "two", "shorter than the tail", "a cut one does not count", "none finished", "unscored"],
)
def test_short_right_rollouts_are_those_up_to_the_median(make_args, rollouts, lengths):
    settings = make_args(
        OGLSSDConfig, per_device_train_batch_size=8, **groups.SMALL, tail_anchor_weight=1.0, tail_anchor_length=8
    )
    group = [Rollout("x", None, "y", reward, size, finished) for reward, size, finished in rollouts]
    assert short_right_tails(group, settings) == lengths


def test_a_tools_tokens_in_a_tail_are_not_anchored():
    batch = {
        "completion_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    assert tail_mask(batch, [3, 0, 0]).tolist() == [[0, 1, 0, 1, 0], [0] * 5, [0] * 5]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tail_anchor_weight": -0.1}, "tail_anchor_weight=-0.1"),
        ({"tail_anchor_weight": float("nan")}, "tail_anchor_weight=nan"),
        ({"tail_anchor_length": 0}, "tail_anchor_length=0"),
    ],
)
def test_settings_of_the_anchor_out_of_range_are_refused(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(OGLSSDConfig, per_device_train_batch_size=8, **{**groups.SMALL, **bad})


def test_the_anchor_is_off_by_default_and_its_help_says_that_it_is_not_settled():
    fields = OGLSSDConfig.__dataclass_fields__
    assert (fields["tail_anchor_weight"].default, fields["tail_anchor_length"].default) == (0.0, 128)
    assert fields["tail_anchor_weight"].metadata["help"].startswith("Not settled")
