# SPDX-License-Identifier: Apache-2.0
"""OGLS-SD and Purified OPSD: the whole step equals a hand computation from raw logits; every kind of group is handled."""

import copy
import random

import pytest
import torch
from datasets import Dataset
from groups import EXACT, SMALL, TEXTS, bare, ids_of, logits_of, privileged, step
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from trl_opsd import OGLSSDConfig, OGLSSDTrainer, OPSDTrainer, PurifiedOPSDConfig, PurifiedOPSDTrainer
from trl_opsd.losses import SignalDecomposition, decompose_signal, purified_logits, steered_logits, token_divergence
from trl_opsd.methods.groups import group_label
from trl_opsd.methods.ogls_sd import steering_contexts, steering_shape
from trl_opsd.teacher.contexts import Moment, Rollout


@pytest.fixture
def build(build_group):
    return build_group


@pytest.mark.parametrize("left_out", [False, True], ids=["all", "those that end"])
def test_ogls_sd_equals_steered_logits_by_hand(build, dataset, left_out):
    settings = {"max_completion_length": 10, "mask_truncated_completions": left_out}
    trainer = build(num_generations=4, per_device_train_batch_size=8, steering_warmup_steps=0, clip=None, **settings)
    args, model = trainer.args, bare(trainer)
    rows = [dataset[index] for index in (0, 5) for _ in range(4)]
    loss, batch = step(trainer, rows)
    completions = trainer._generate_single_turn([None] * 8)[0]
    rollouts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
    cut = [ids[-1] != trainer.tokenizer.eos_token_id for ids in completions]
    assert cut == [False, False, True, True, False, False, False, False]  # one wrong, one right
    total, count = 0.0, 0
    for start in (0, 4):
        row = rows[start]
        texts = rollouts[start : start + 4]
        right = [text for text in texts if "boxed" in text] + [row["solution"]]
        wrong = [text for text in texts if "boxed" not in text]
        for index in range(start, start + 4):
            if "boxed" in rollouts[index] or (left_out and cut[index]):
                continue
            completion = completions[index][: args.distillation_length]
            plain = ids_of(trainer, row["prompt"], **args.chat_template_kwargs)
            base = logits_of(model, plain, completion)
            pools = [
                torch.stack(
                    [
                        logits_of(model, privileged(trainer, row, args.teacher_prompt_template, t), completion)
                        for t in pool
                    ]
                )
                for pool in (right, wrong)
            ]
            target = steered_logits(base, *pools, strength=3.0)
            total += token_divergence(base, target, divergence="forward_kl", temperature=args.temperature).sum().item()
            count += len(completion)
    assert batch["num_loss_items"] == count
    assert loss.item() == pytest.approx(total / count, **EXACT)
    assert total > 0.01
    tokens = sum(map(len, completions))
    assert trainer._metrics["train"]["reflection_markers_per_1000"] == [pytest.approx(1000 / tokens)]  # one "wait"


@pytest.mark.parametrize(
    ("trainer_class", "views"), [(OPSDTrainer, ["teacher"]), (PurifiedOPSDTrainer, ["plain", "teacher", "reference"])]
)
@pytest.mark.parametrize("template", [None, "{prompt} Please."])
def test_a_batch_of_checked_rows_renders_each_prompt_once_for_each_view(
    build, dataset, monkeypatch, trainer_class, views, template
):
    trainer = build(trainer_class, num_generations=2, per_device_train_batch_size=8, prompt_template=template)
    render, rendered = trainer.tokenizer.apply_chat_template, []

    def counted(conversation, **kwargs):
        rendered.append(conversation)
        return render(conversation, **kwargs)

    monkeypatch.setattr(trainer.tokenizer, "apply_chat_template", counted)
    step(trainer, [dataset[index] for index in range(4) for _ in range(2)])
    ours = [conversation for conversation in rendered if isinstance(conversation[0], dict)]  # TRL renders whole batches
    assert len(ours) == 4 * len(views)


def test_a_batch_that_leaves_out_every_cut_rollout_warns_and_scores_none(build, dataset):
    trainer = build(OPSDTrainer, max_completion_length=1, mask_truncated_completions=True)
    told = r"Every rollout .* cut .* mask_truncated_completions=True .* trains on nothing.*max_completion_length \(1\)"
    with pytest.warns(UserWarning, match=told):
        loss, _ = step(trainer, dataset.select(range(4)))
    assert loss.item() == 0 and trainer._metrics["train"]["teacher/tokens_computed"] == [0]


def test_purified_equals_purified_logits_by_hand(build, dataset, tokenizer):
    trainer = build(PurifiedOPSDTrainer, num_generations=1, temperature=1.3)
    args, model = trainer.args, bare(trainer)
    rows = [dataset[index] for index in (0, 3, 5, 7)]
    loss, batch = step(trainer, rows)
    completions = trainer._generate_single_turn([None] * 4)[0]
    total, count, heat = 0.0, 0, args.loss_temperature
    for row, completion in zip(rows, completions, strict=True):
        base = logits_of(model, ids_of(trainer, row["prompt"], **args.chat_template_kwargs), completion)
        teacher = logits_of(model, privileged(trainer, row, args.teacher_prompt_template, row["solution"]), completion)
        alone = logits_of(model, privileged(trainer, row, args.reference_prompt_template, row["solution"]), completion)
        # Each frozen view is tempered once, before the log-ratio; the target is not tempered again.
        target = purified_logits(base / heat, teacher / heat, alone / heat, num_tokens=len(tokenizer))
        total += token_divergence(base / heat, target, divergence="jsd").sum().item()
        count += len(completion)
    assert loss.item() == pytest.approx(total / count, **EXACT)
    assert total > 0.01 and batch["num_loss_items"] == count


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("kind", ["base", "live"])
def test_the_logged_decomposition_equals_its_formula_from_raw_logits(build, dataset, tokenizer, real, kind):
    heat = 1.3
    trainer = build(
        PurifiedOPSDTrainer,
        real_tokens_only=real,
        num_generations=1,
        temperature=heat,
        decomposition_steps=2,
        teacher_model_kind=kind,
        texts=TEXTS[:4],
    )
    base, args = bare(trainer), trainer.args
    with torch.no_grad():  # the student has moved since the start
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    student = bare(trainer)
    frozen = base if kind == "base" else student
    rows = [dataset[index] for index in (0, 3, 5, 7)]
    step(trainer, rows)
    sums, count = torch.zeros(6, dtype=torch.float64), 0
    for row, completion in zip(rows, trainer._generate_single_turn([None] * 4)[0], strict=True):
        q = logits_of(student, ids_of(trainer, row["prompt"], **args.chat_template_kwargs), completion)
        t = logits_of(frozen, privileged(trainer, row, args.teacher_prompt_template, row["solution"]), completion)
        r = logits_of(frozen, privileged(trainer, row, args.reference_prompt_template, row["solution"]), completion)
        width = len(tokenizer) if real else None
        sums += torch.stack([part.sum() for part in decompose_signal(q / heat, t / heat, r / heat, num_tokens=width)])
        count += len(completion)
    metrics = trainer._metrics["train"]
    for name, value in zip(SignalDecomposition._fields, (sums / count).tolist(), strict=True):
        assert metrics[f"decomposition/{name}"] == [pytest.approx(value, rel=1e-5, abs=1e-7)]
    assert sums[0] / count > 0.1
    for done in (1, 2, 3):
        trainer.state.global_step = done
        step(trainer, rows)
    assert len(metrics["decomposition/total_norm"]) == 2  # at steps 0 and 2


CAP = 2.0
# transformers runs Gemma 2, whose attention is capped too, in eager only, where padding in float64 gives NaN.
CAPPED = {
    "gemma2": (Gemma2Config, "eager", torch.float32, {"rel": 1e-4}),
    "gemma3": (Gemma3TextConfig, "sdpa", torch.float64, EXACT),
}


@pytest.fixture(params=CAPPED)
def capped(request, tokenizer):
    """A tiny Gemma whose logits are capped, hard enough that the cap bites, and how exactly it computes."""
    config_class, attention, dtype, tolerance = CAPPED[request.param]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        final_logit_softcapping=CAP,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype), tolerance


def loss_of_step(trainer, rows):
    """Sum over the micro-batches of an optimizer step, after TRL's shuffle and split."""
    trainer._buffered_inputs, trainer._step = None, 0
    trainer._prepare_inputs(list(rows))
    return sum(trainer.compute_loss(trainer.model, batch) for batch in trainer._buffered_inputs)


def test_opsd_under_a_capped_head_equals_capped_logits_by_hand(build, dataset, capped):
    model, tolerance = capped
    trainer = build(OPSDTrainer, model=model, gradient_accumulation_steps=2, clip=None)
    rows = [dataset[index] for index in range(8)]
    loss = loss_of_step(trainer, rows)
    args, model, completions = trainer.args, bare(trainer), trainer._generate_single_turn([None] * 8)[0]
    total, count, heights = 0.0, 0, []
    for row, completion in zip(rows, completions, strict=True):
        base = logits_of(model, ids_of(trainer, row["prompt"], **args.chat_template_kwargs), completion)
        target = logits_of(model, privileged(trainer, row, args.teacher_prompt_template, row["solution"]), completion)
        total += token_divergence(base, target, temperature=args.temperature).sum().item()
        count += len(completion)
        heights.append(base.abs().max().item())
    assert loss.item() == pytest.approx(total / count, **tolerance)
    assert total > 0.01 and max(heights) > 0.9 * CAP


@pytest.mark.parametrize("trainer_class", [OGLSSDTrainer, PurifiedOPSDTrainer])
def test_a_capped_head_is_refused_where_hidden_states_would_be_subtracted(build, capped, trainer_class):
    with pytest.raises(ValueError, match=r"final_logit_softcapping.*adds up several views"):
        build(trainer_class, model=capped[0], num_generations=4)


def test_a_capped_head_is_refused_where_hidden_states_would_be_averaged(build, dataset, capped):
    trainer = build(model=capped[0], num_generations=4, steering_teacher="mean_of_positives")
    with pytest.raises(ValueError, match="OGLS-SD adds up several views"):
        step(trainer, [dataset[0]] * 4)


def test_a_linear_head_keeps_one_anchor_and_one_direction(build, dataset):
    trainer = build(num_generations=4, per_device_train_batch_size=8)
    _, batch = step(trainer, [dataset[index] for index in (0, 5) for _ in range(4)])
    shape = (*batch["distillation_mask"].shape, trainer.scorer.hidden_size)
    assert batch["anchor_hidden"].shape == batch["direction_hidden"].shape == shape


def test_padding_rows_of_the_head_are_left_out_by_default(build, make_model, dataset, tokenizer, make_args):
    losses = {}
    for only in (True, False):
        trainer = PurifiedOPSDTrainer(
            model=make_model(torch.float64, vocab_size=len(tokenizer) + 40),
            args=make_args(PurifiedOPSDConfig, real_tokens_only=only, max_steps=1, learning_rate=0.0),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        losses[only] = trainer.state.log_history[0]["divergence"]
    assert losses[True] != losses[False]


MOMENT = Moment(random.Random(0))


def rollouts(rewards, solution="s"):
    return [Rollout("x", solution, f"y{index}", reward) for index, reward in enumerate(rewards)]


@pytest.fixture
def settings(make_args):
    def make(**overrides):
        return make_args(OGLSSDConfig, per_device_train_batch_size=8, **SMALL, **overrides)

    return make


@pytest.mark.parametrize(
    ("rewards", "solution", "label", "distilled"),
    [
        ([1, 1, 1], "s", "all_right", []),
        ([0, 0, 0], "s", "all_wrong", [0, 1, 2]),
        ([0, 0, 0], None, "all_wrong_without_solution", []),
        ([1, 0, 1], None, "mixed", [1]),
        ([None, 0, 1], None, "mixed", [1]),
        ([None, None, None], "s", "unscored", []),
    ],
)
def test_every_kind_of_group_is_named_and_used_as_the_method_says(settings, rewards, solution, label, distilled):
    group = rollouts(rewards, solution)
    assert group_label(group, settings()) == label
    contexts = steering_contexts(group, settings(), MOMENT)
    assert [index for index, views in enumerate(contexts) if views] == distilled


def weights_of(views):
    return {(view.template, view.slot): (view.anchor, view.direction) for view in views}


def test_pools_and_weights_are_the_papers(settings):
    views = weights_of(steering_contexts(rollouts([1, 0, 0]), settings(), MOMENT)[1])
    assert views == {
        ("plain", None): (1.0, 0.0),
        ("teacher", "y0"): (0.0, 0.5),
        ("teacher", "s"): (0.0, 0.5),
        ("teacher", "y1"): (0.0, -0.5),
        ("teacher", "y2"): (0.0, -0.5),
    }


def test_the_papers_ablations_are_settings(settings):
    group = rollouts([1, 0])
    mean = settings(steering_teacher="mean_of_positives")
    assert weights_of(steering_contexts(group, mean, MOMENT)[1]) == {
        ("teacher", "y0"): (0.5, 0.0),
        ("teacher", "s"): (0.5, 0.0),
    }
    assert not steering_shape(mean, 0).uses_direction
    positive = weights_of(steering_contexts(group, settings(steering_teacher="positive_only"), MOMENT)[1])
    assert positive[("plain", None)] == (1.0, -1.0)
    assert sum(direction for _, direction in positive.values()) == 0


def test_a_capped_pool_is_drawn_with_the_seed(settings):
    import random

    group = rollouts([1, 1, 1, 1, 0])
    capped = settings(max_contexts_per_pool=2)
    draws = [steering_contexts(group, capped, Moment(random.Random(seed)))[4] for seed in (0, 0, 1)]
    assert len(draws[0]) == 1 + 2 + 1 and draws[0] == draws[1] != draws[2]


def test_think_blocks_and_length_of_inserted_rollouts(settings):
    group = [Rollout("x", None, "<think>\nlong\n</think>\n\n4", 1.0), Rollout("x", None, "wrong", 0.0)]
    stripped = settings(strip_thinking=True, max_rollout_context_length=7)
    views = steering_contexts(group, stripped, MOMENT)[1]
    assert [(view.slot, view.slot_tokens) for view in views[1:]] == [("4", 7), ("wrong", 7)]


def test_lambda_ramps_to_its_strength(settings):
    ramped = settings(steering_strength=4.0, steering_warmup_steps=4)
    assert [steering_shape(ramped, step).strength for step in (0, 1, 3, 100)] == [1.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("texts", [("\\boxed{1}",), ("wrong",)], ids=["all right", "all wrong without solution"])
def test_a_batch_with_nothing_to_train_on_gives_zero_that_runs_backward(build, dataset, texts):
    rows = Dataset.from_list([{"prompt": row["prompt"], "solution": None} for row in dataset])
    trainer = build(texts=texts, rows=rows, num_generations=4)
    loss, _ = step(trainer, [rows[0]] * 4)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in trainer.model.parameters())


def test_kinds_of_groups_are_logged_and_rewards_that_never_split_warn(build, dataset):
    trainer = build(num_generations=4, texts=("wrong",), max_steps=10, learning_rate=0.0)
    with pytest.warns(UserWarning, match="split no group into right and wrong in 10"):
        trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["groups/all_wrong"] == 1.0 and entry["groups/used"] == 1.0


def test_a_reward_at_the_threshold_is_right_although_trl_keeps_it_in_float32(build, dataset):
    rewards = [0.7, 0.3] * 4

    def reward(completions, **columns):
        return rewards[: len(completions)]

    trainer = build(reward=reward, reward_threshold=0.7, num_generations=4, per_device_train_batch_size=8)
    _, batch = step(trainer, [dataset[place] for place in (0, 5) for _ in range(4)])
    assert batch["rollout_outcome"].tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    ("config_class", "bad", "message"),
    [
        (OGLSSDConfig, {"num_generations": 1}, "num_generations=1"),
        (OGLSSDConfig, {"steering_strength": -1.0}, "strength=-1.0"),
        (OGLSSDConfig, {"steering_teacher": "best"}, "steering_teacher='best'"),
        (OGLSSDConfig, {"max_contexts_per_pool": 0}, "max_contexts_per_pool=0"),
        (PurifiedOPSDConfig, {"tanh_bound": 0.0}, "tanh_bound=0.0"),
        (PurifiedOPSDConfig, {"conservativeness": -1.0}, "conservativeness=-1.0"),
        (PurifiedOPSDConfig, {"reference_prompt_template": "{prompt} {solution}"}, "reference_prompt_template"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused_by_name(make_args, config_class, bad, message):
    defaults = {"per_device_train_batch_size": 8, **(SMALL if config_class is OGLSSDConfig else {})}
    with pytest.raises(ValueError, match=message):
        make_args(config_class, **{**defaults, **bad})


def test_ogls_sd_needs_to_know_what_is_right(make_model, make_args, tokenizer):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "why?"}], "solution": "because"}] * 8)
    with pytest.raises(ValueError, match="reward_funcs is not given"):
        OGLSSDTrainer(
            model=make_model(),
            args=make_args(OGLSSDConfig, per_device_train_batch_size=8, **SMALL),
            train_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
        )


@pytest.mark.parametrize("trainer_class", [OGLSSDTrainer, PurifiedOPSDTrainer])
def test_training_moves_the_student_and_not_the_teacher(build, dataset, trainer_class):
    trainer = build(trainer_class, num_generations=4, learning_rate=0.05, max_steps=2, max_grad_norm=1.0)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any((p - s).abs().max() > 1e-4 for p, s in zip(trainer.model.parameters(), start, strict=True))
    for (_, value), first in zip(trainer.teacher.values.items(), start, strict=True):
        assert torch.equal(value, first)


@pytest.mark.parametrize("trainer_class", [OPSDTrainer, OGLSSDTrainer, PurifiedOPSDTrainer])
def test_reading_shared_contexts_once_gives_the_same_step(build, dataset, trainer_class):
    rows = [dataset[index] for index in (0, 5) for _ in range(4)]
    losses, counts = [], []
    for share in (False, True):
        trainer = build(trainer_class, num_generations=4, per_device_train_batch_size=8)
        trainer.scorer._sharing.supported = None if share else False
        losses.append(step(trainer, rows)[0].item())
        counts += trainer._metrics["train"]["teacher/tokens_computed"]
    assert losses[1] == pytest.approx(losses[0], **EXACT) and abs(losses[0]) > 1e-4
    assert counts[1] < 0.6 * counts[0]
