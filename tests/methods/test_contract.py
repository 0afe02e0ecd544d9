# SPDX-License-Identifier: Apache-2.0
"""What every method's trainer must satisfy, on given rollouts and a tiny model in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from steps import EXACT, completion_of, forward_kl_terms, ids_of, logits_of, loss_of_rows, teacher_prompt

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.methods import OPSD, Method
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.trainers.rollout_text import rollouts_text

CLIP = 0.05


class SelfTrainer(OPSDTrainer):
    """A method whose teacher reads exactly what the student reads."""

    method = Method(
        name="self",
        contexts=lambda group, settings, draw: [(TeacherContext("plain", None, anchor=1.0),) for _ in group],
        paper=OPSD.paper,
    )


def test_equal_contexts_and_weights_give_loss_and_gradient_zero(build, dataset):
    trainer = build(trainer_class=SelfTrainer, clip=None)
    loss, _ = loss_of_rows(trainer, dataset.select(range(4)))
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert max(p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None) < 1e-12


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_equality_gives_zero_for_the_other_divergences_too(build, dataset, divergence):
    loss, _ = loss_of_rows(build(trainer_class=SelfTrainer, divergence=divergence), dataset.select(range(4)))
    loss.backward()
    assert abs(loss.item()) < 1e-14


@pytest.mark.parametrize("clip", [None, "upper"])
def test_the_loss_of_a_step_equals_a_hand_computation_from_raw_logits(build, dataset, clip):
    trainer = build(clip=clip, clip_value=CLIP)
    model, args = copy.deepcopy(trainer.model), trainer.args
    model.__dict__.pop("forward")
    rows = dataset.select([0, 3, 5, 7])
    loss, _ = loss_of_rows(trainer, rows)
    total, count = 0.0, 0
    for row in rows:
        student, completion = completion_of(trainer, row)
        teacher = ids_of(trainer.tokenizer, teacher_prompt(args, row), **args.teacher_chat_template_kwargs)
        terms = forward_kl_terms(
            logits_of(model, student, completion), logits_of(model, teacher, completion), args.temperature
        )
        total += (terms.clamp(max=CLIP) if clip else terms).sum().item()
        count += len(completion)
    assert len({len(completion_of(trainer, row)[0]) for row in rows}) > 1
    assert loss.item() == pytest.approx(total / count, **EXACT)
    assert abs(total) > 1e-3


def test_gradient_of_a_step_equals_autograd_through_raw_logits(build, dataset):
    trainer = build(clip=None)
    model, args = copy.deepcopy(trainer.model), trainer.args
    model.__dict__.pop("forward")
    rows = dataset.select([0, 3])
    loss, _ = loss_of_rows(trainer, rows)
    loss.backward()
    total, count = 0.0, 0
    for row in rows:
        student, completion = completion_of(trainer, row)
        teacher = ids_of(trainer.tokenizer, teacher_prompt(args, row), **args.teacher_chat_template_kwargs)
        target = logits_of(model, teacher, completion).detach()
        total = total + forward_kl_terms(logits_of(model, student, completion), target, args.temperature).sum()
        count += len(completion)
    (total / count).backward()
    for (name, ours), (_, hand) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, hand.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert hand.grad.abs().max() > 1e-4, name


def test_batch_order_and_companions_change_nothing(build, dataset):
    trainer = build()
    rows = dataset.select([0, 2, 5, 7])
    together, _ = loss_of_rows(trainer, rows)
    reordered, _ = loss_of_rows(trainer, dataset.select([7, 0, 5, 2]))
    assert reordered.item() == pytest.approx(together.item(), **EXACT)
    weighted = 0.0
    for row in rows:
        alone, batch = loss_of_rows(trainer, [row])
        weighted += alone.item() * batch["num_loss_items"].item()
    _, batch = loss_of_rows(trainer, rows)
    assert weighted / batch["num_loss_items"].item() == pytest.approx(together.item(), **EXACT)


def test_teacher_micro_batches_change_nothing(build, dataset):
    whole, _ = loss_of_rows(build(), dataset.select(range(4)))
    single, _ = loss_of_rows(build(teacher_tokens_per_forward=1), dataset.select(range(4)))
    assert single.item() == pytest.approx(whole.item(), **EXACT)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_one_by_four_equals_two_by_two_accumulation(build, make_model, reduction):
    weights = []
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = build(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=1e9,
            loss_reduction=reduction,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in make_model(torch.float64).parameters()])
    assert (weights[0] - start).abs().max() > 1e-6
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)


def test_a_logged_loss_is_the_mean_over_the_step(build):
    losses = []
    for batch_size, steps in ((4, 1), (1, 4)):
        trainer = build(per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, learning_rate=0.0)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
@pytest.mark.parametrize("lora", [None, True, "pissa"], ids=["full", "lora", "pissa"])
def test_resumed_equals_uninterrupted_bitwise(build, make_model, tmp_path, kind, lora):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "teacher_model_kind": kind,
        "teacher_update_rate": 0.3,
        "given": False,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    dtype = torch.float32 if lora == "pissa" else torch.float64  # peft's choice
    if lora:
        settings["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=lora)
    whole = build(**settings, model=make_model(dtype), output_dir=str(tmp_path / "run"))
    whole.train()
    resumed = build(**settings, model=make_model(dtype), output_dir=str(tmp_path / "run"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        if "divergence" in a:
            assert (a["loss"], a["divergence"]) == (b["loss"], b["divergence"])
    for name, value in whole.teacher.values.items():
        assert torch.equal(value, resumed.teacher.values[name]), name


def test_scoring_leaves_dropout_states_as_they_were(build, make_model, dataset):
    trainer = build(model=make_model(torch.float64, attention_dropout=0.5))
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    before = {name: module.training for name, module in trainer.model.named_modules()}
    trainer._generate_and_score_completions(list(dataset.select(range(4))))
    assert {name: module.training for name, module in trainer.model.named_modules()} == before


def test_the_teacher_is_scored_without_dropout(build, make_model, dataset):
    losses = []
    for dropout in (0.0, 0.5):
        trainer = build(model=make_model(torch.float64, attention_dropout=dropout))
        batch = trainer._generate_and_score_completions(list(dataset.select(range(4))))
        losses.append(batch["anchor_hidden"])
    torch.testing.assert_close(*losses)


def anchor_of(trainer, dataset):
    trainer.model.train()
    return trainer._generate_and_score_completions(list(dataset.select(range(4))))["anchor_hidden"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_training_moves_the_teacher_by_its_kind_alone(build, dataset, kind, lora):
    settings = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if lora else {}
    trainer = build(
        teacher_model_kind=kind, teacher_update_rate=0.5, learning_rate=0.05, max_steps=3, max_grad_norm=1, **settings
    )
    before = anchor_of(trainer, dataset)
    trainer.train()
    after = anchor_of(trainer, dataset)
    live = build(model=trainer.model, teacher_model_kind="live") if not lora else None
    if kind == "base":
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    else:
        assert (after - before).abs().max() > 1e-4
    if kind == "live" and live is not None:
        torch.testing.assert_close(after, anchor_of(live, dataset))


def test_no_gradient_reaches_the_teacher(build, dataset):
    trainer = build(teacher_model_kind="ema")
    _, batch = loss_of_rows(trainer, dataset.select(range(4)))
    assert not batch["anchor_hidden"].requires_grad
    assert not any(value.requires_grad for value in trainer.teacher.values.values())


def test_tokens_written_by_tools_are_not_distilled(build, dataset, monkeypatch):
    trainer = build()
    plain, _ = loss_of_rows(trainer, dataset.select([0]))
    generate = trainer._generate

    def with_tools(prompts):
        output = list(generate(prompts))
        output[2] = [[1] * (len(ids) - 2) + [0, 0] for ids in output[1]]
        return tuple(output)

    monkeypatch.setattr(trainer, "_generate", with_tools)
    masked, batch = loss_of_rows(trainer, dataset.select([0]))
    assert batch["num_loss_items"] == batch["completion_mask"].sum() - 2
    assert batch["distillation_mask"].size(1) == batch["completion_mask"].size(1) - 2  # the tool's were the last
    assert masked.item() != plain.item()


def test_only_the_first_tokens_are_distilled_and_the_rest_changes_nothing(build, dataset):
    trainer = build(distillation_length=2)
    _, batch = loss_of_rows(trainer, dataset.select(range(4)))
    assert batch["distillation_mask"].shape[1] == 2 == batch["anchor_hidden"].shape[1]
    assert batch["completion_ids"].shape[1] > 2
    skipping = build(num_loss_tokens_to_skip=1)
    _, batch = loss_of_rows(skipping, dataset.select(range(4)))
    assert batch["distillation_mask"][:, 0].sum() == 0


def count_student_forwards(trainer):
    calls = []
    trainer.model.model.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    return calls


def test_a_reward_adds_the_policy_gradient_loss_from_the_same_forward(build, dataset):
    def reward(completions, **kwargs):
        return [float(len(completion[0]["content"])) + index for index, completion in enumerate(completions)]

    settings = {"reward_funcs": reward, "num_generations": 2, "given": False}
    rows = [row for row in dataset.select(range(2)) for _ in range(2)]
    trainer = build(**settings, reward_weight=0.5)
    loss, batch = loss_of_rows(trainer, rows)
    assert batch["advantages"].abs().max() > 0.1
    loss.backward()
    mixed = trainer.model.lm_head.weight.grad.clone()
    trainer.model.zero_grad()
    # The policy-gradient loss alone, by TRL, on the same batch.
    cached = trainer.policy_logps(trainer.model, batch)
    trainer.policy_loss(trainer.model, batch, cached).backward()
    policy = trainer.model.lm_head.weight.grad.clone()
    alone = build(**settings, reward_weight=0.0)
    alone.model.train()
    alone.compute_loss(alone.model, batch).backward()
    assert policy.abs().max() > 1e-3
    torch.testing.assert_close(mixed, 0.5 * policy + alone.model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)
    calls = count_student_forwards(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert calls == [True]


def test_distillation_alone_runs_one_student_forward_and_no_old_log_probabilities(build, dataset):
    trainer = build(num_iterations=2)
    calls = count_student_forwards(trainer)
    trainer.model.train()
    batch = trainer._prepare_inputs(list(dataset.select(range(4))))
    scoring = calls.count(False)
    trainer.compute_loss(trainer.model, batch)
    assert calls.count(True) == 1
    assert scoring == 2  # the head check and one teacher forward


@pytest.mark.filterwarnings("ignore:Every rollout of a generation batch was cut")  # samples of random weights
@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"loss_reduction": "sequence", "num_generations": 2},
        {"mask_truncated_completions": True},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_grpo_still_work(build, make_model, settings):
    trainer = build(model=make_model(), given=False, max_steps=4, learning_rate=1e-2, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(loss == loss for loss in losses)


def test_evaluation_gives_loss_and_reward(build, dataset):
    trainer = build(eval_dataset=dataset)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_divergence", "eval_student_entropy"} <= metrics.keys() | (
        trainer.state.log_history[-1].keys()
    )


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_made_from_the_weights_is_taught_by_the_initial_model(build, make_model, dataset, initialisation):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=initialisation)
    same = build(trainer_class=SelfTrainer, model=make_model(), peft_config=adapter, clip=None)
    assert loss_of_rows(same, dataset.select(range(4)))[0].item() == pytest.approx(0, abs=1e-6)
    original = anchor_of(build(model=make_model()), dataset)
    trainer = build(model=make_model(), peft_config=adapter, learning_rate=0.05, max_steps=2)
    torch.testing.assert_close(anchor_of(trainer, dataset), original, rtol=1e-3, atol=1e-3)
    trainer.train()
    torch.testing.assert_close(anchor_of(trainer, dataset), original, rtol=1e-3, atol=1e-3)


def test_an_existing_adapter_is_part_of_the_base_teacher(build, make_model, dataset):
    from peft import get_peft_model

    model = get_peft_model(make_model(torch.float64), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    trainer = build(model=model, learning_rate=0.05, max_steps=2)
    before = anchor_of(trainer, dataset)
    bare = build(model=make_model(torch.float64))
    assert (before - anchor_of(bare, dataset)).abs().max() > 1e-3
    trainer.train()
    torch.testing.assert_close(anchor_of(trainer, dataset), before, rtol=0, atol=0)


def test_the_log_holds_every_diagnostic(build, tmp_path):
    trainer = build(log_completions=True)
    trainer.train()
    entry = trainer.state.log_history[0]
    expected = {
        "loss",
        "divergence",
        "clip_gradient_agreement",
        "clipped_share",
        "student_entropy",
        "target_entropy",
        "entropy_gap",
        "top_token_agreement",
        "divergence/first_token",
        "divergence/1-15",
        "divergence/wrong",
        "reflection_markers_per_1000",
        "teacher/solution_shortened",
        "teacher/tokens_computed",
        "time/teacher_forward",
        "time/loss",
        "completions/mean_length",
        "completions/clipped_ratio",
        "rewards/accuracy_reward/mean",
    }
    assert expected <= entry.keys()
    import pandas

    table = pandas.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table["divergence"].notna().all() and len(table) == 4


def test_completions_are_printed_whole_at_80_columns(build, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    trainer = build(log_completions=True, num_completions_to_print=2)
    trainer.train()
    import pandas

    table = pandas.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    printed = capsys.readouterr().out
    assert [f"--- rollout {number} of 4, step 1 ---" in printed for number in (1, 2, 3, 4)] == [
        True,
        False,
        True,
        False,
    ]
    for row in (0, 2):
        text = table["completion"][row]
        text = text if isinstance(text, str) else text[-1]["content"]
        assert f"completion: {text.strip()}\n" in printed and f"divergence {table['divergence'][row]:.4g}" in printed
    assert trainer.num_completions_to_print == 2


def test_a_printed_rollout_commands_no_terminal_and_turns_are_read():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\x1b[2J\n\tc"}]
    text = rollouts_text([{"prompt": turns, "completion": turns[1:], "divergence": 0.123456}], 7, None)
    assert text == (
        "--- rollout 1 of 1, step 7 ---\nprompt: user: a\nassistant: b\\x1b[2J\n\tc\ncompletion: b\\x1b[2J\n\tc\n"
        "divergence 0.1235\n\n"
    )
    assert rollouts_text([], 7, 2) == "" and rollouts_text([{"prompt": "p", "completion": "c"}], 7, 0) == ""


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(build, monkeypatch):
    trainer = build()
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("inf"))
    trainer.scorer._head_checked = True
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 .*=\?"):
        trainer.train()


def test_the_card_names_paper_templates_and_settings(build, tmp_path):
    trainer = build()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("2601.18734", trainer.args.teacher_prompt_template, '"teacher": true', "`clip_value` | 0.05"):
        assert text in card


def test_a_method_without_a_paper_has_a_card_too(build, tmp_path):
    trainer = build(trainer_class=type("Unpublished", (OPSDTrainer,), {"method": replace(OPSD, name="mine", paper={})}))
    trainer.create_model_card(model_name="tiny")
    assert "on its own rollouts by mine with [trl_opsd]" in (tmp_path / "out" / "README.md").read_text()


def test_defaults_are_the_papers(tmp_path):
    config = OPSDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    pinned = {
        "divergence": "forward_kl",
        "clip": "upper",
        "clip_value": 0.05,
        "temperature": 1.1,
        "loss_temperature": 1.1,
        "top_p": 0.95,
        "top_k": 20,
        "num_generations": 1,
        "max_completion_length": 1024,
        "learning_rate": 5e-6,
        "max_grad_norm": 0.1,
        "max_steps": 100,
        "save_steps": 25,
        "teacher_model_kind": "base",
        "reward_weight": 0.0,
        "chat_template_kwargs": {"enable_thinking": False},
        "teacher_chat_template_kwargs": {"enable_thinking": True},
    }
    assert {name: getattr(config, name) for name in pinned} == pinned
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32


def test_an_evaluation_between_two_steps_does_not_change_a_pending_batch(build, dataset):
    histories = []
    for evaluate in (False, True):
        trainer = build(
            teacher_model_kind="ema",
            teacher_update_rate=0.5,
            learning_rate=0.05,
            max_steps=2,
            steps_per_generation=2,
            eval_dataset=dataset.select(range(4)),
            eval_strategy="steps" if evaluate else "no",
            eval_steps=1,
        )
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == histories[1]


def test_every_epoch_has_the_order_that_trl_gives_it_also_after_a_resume(build):
    from trl import GRPOTrainer

    trainer = build(max_steps=4)
    uninterrupted = GRPOTrainer._get_train_sampler(trainer)
    orders = [list(uninterrupted) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    resumed = trainer._get_train_sampler()
    for epoch in (2, 0, 1):
        resumed.set_epoch(epoch)
        assert list(resumed) == orders[epoch]
