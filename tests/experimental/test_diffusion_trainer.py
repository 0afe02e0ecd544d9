# SPDX-License-Identifier: Apache-2.0
"""d-OPSD's trainer on a tiny random model: a whole step by hand, its invariances, resuming, saving, and what is refused."""

import json
import math
import random
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launching import run
from masked import QUICK, make_model, make_rows, make_settings, make_tokenizer, make_trainer
from peft import LoraConfig
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, TrainerCallback, TrainingArguments

from trl_opsd.demo import masked
from trl_opsd.experimental.diffusion.accuracy import measure_accuracy
from trl_opsd.experimental.diffusion.contexts import states_of_update
from trl_opsd.experimental.diffusion.rows import RepeatedRows
from trl_opsd.experimental.diffusion.settings import LORA, DiffusionOPSDSettings
from trl_opsd.experimental.diffusion.trainer import DiffusionOPSDConfig, DiffusionOPSDTrainer

WORKER = str(Path(__file__).parents[1] / "support" / "masked_worker.py")
ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["Wqkv", "Wo"], lora_dropout=0.0)
MANY = {"updates_per_sample": 2, "num_samples": 4, "verifier": "masked:some", "max_steps": 6}


def batch_of(trainer, rows=4):
    return {"rows": [row._asdict() for row in trainer.train_dataset[:rows]]}


def moved(model, seed=7):
    """Move the student away from its start, so that it is not the teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def loss_by_hand(student, teacher, samples, update, args):
    """Mean over prompts, one state at a time, with the formula written out for each position."""
    total = 0.0
    for sample in samples:
        if sample.reason is not None:
            continue
        part = states_of_update(len(sample.states), update, args.updates_per_sample)
        values = []
        for state, seen in zip(sample.states[part], sample.taught[part], strict=True):
            own, wanted = (
                model(input_ids=torch.cat([torch.tensor(sample.prompt), ids])[None]).logits[0, len(sample.prompt) :]
                for model, ids in ((student, state), (teacher, seen))
            )
            mask_id = max(state.tolist())  # the mask token is the last of the vocabulary
            masked = [place for place, token in enumerate(state.tolist()) if token == mask_id]
            block = [place for place in masked if place // args.block_length == masked[0] // args.block_length]
            chosen = sorted(block, key=lambda place: -wanted[place].max().item())[: args.tokens_per_step]
            for place in chosen:
                kept = wanted[place].detach().argsort(descending=True)[: args.loss_top_k]
                q = own[place][kept].exp() / own[place][kept].exp().sum()
                p = (wanted[place][kept].exp() / wanted[place][kept].exp().sum()).detach()
                for term in q * (q.log() - p.log()):
                    values.append(
                        term if term < args.clip_value else torch.tensor(args.clip_value, dtype=torch.float64)
                    )
        total = total + sum(values) / (part.stop - part.start)
    return total / len(samples)


@pytest.mark.parametrize("update", [0, 1])
def test_a_step_is_the_paper_s_loss_and_gradient_by_hand(tmp_path, update):
    trainer = make_trainer(tmp_path, dtype=torch.float64, **MANY)
    start = make_model(make_tokenizer(), dtype=torch.float64).eval()
    moved(trainer.model)
    batch = batch_of(trainer)
    trainer.model.train()
    for step in range(update + 1):
        trainer.state.global_step = step
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (samples,) = trainer.samples
    used = [sample.reason is None for sample in samples]
    assert any(used) and not all(used)
    expected = loss_by_hand(trainer.model, start, samples, update, trainer.args)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10) and abs(loss.item()) > 1e-3
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_a_teacher_that_sees_no_more_and_is_the_student_leaves_no_loss(tmp_path, adapter):
    trainer = make_trainer(tmp_path, dtype=torch.float64, retained_share=0.0, peft_config=adapter)
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert all(p.grad.abs().max() < 1e-12 for p in trainer.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_the_teacher_stays_the_initial_model_and_a_live_one_follows(tmp_path, adapter):
    losses = {}
    for kind in ("base", "live"):
        trainer = make_trainer(
            tmp_path / kind, dtype=torch.float64, retained_share=0.0, peft_config=adapter, teacher_model_kind=kind
        )
        assert trainer.teacher.adapter_off == (adapter is not None and kind == "base")
        moved(trainer.model)
        losses[kind] = trainer.compute_loss(trainer.model.train(), batch_of(trainer)).item()
    assert abs(losses["live"]) < 1e-12 and abs(losses["base"]) > 1e-4


def test_prompts_without_a_right_answer_have_loss_zero_and_are_counted(tmp_path):
    trainer = make_trainer(tmp_path, verifier="masked:nothing")
    moved(trainer.model)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in trainer.model.parameters())
    means = trainer.means.reduced(lambda sums: sums, trainer.accelerator.device)
    assert means["rows/no_right_sample"] == 1 and means["rows/used"] == means["samples/right"] == 0
    assert means["samples/drawn"] == 2 and means["states/trained"] == 0 and "divergence" not in means


def test_answers_are_sampled_until_one_is_right(tmp_path):
    trainer = make_trainer(tmp_path, verifier="masked:some", num_samples=8)
    trainer.compute_loss(trainer.model, batch_of(trainer))
    (samples,) = trainer.samples
    drawn = [sample.num_drawn for sample in samples]
    assert min(drawn) == 1 and 1 < max(drawn) <= 8
    assert all(sample.reason is None for sample in samples)


def test_the_first_answer_and_later_ones_have_temperatures_of_their_own(tmp_path):
    greedy = make_trainer(tmp_path, verifier="masked:nothing", temperature=0.0, num_samples=1)
    later = make_trainer(tmp_path, verifier="masked:nothing", temperature=0.0, num_samples=2, later_temperature=5.0)
    for trainer in (greedy, later):
        trainer.compute_loss(trainer.model, batch_of(trainer))
    pairs = list(zip(greedy.samples[0], later.samples[0], strict=True))
    assert any(not torch.equal(one.states, other.states) for one, other in pairs)
    again = make_trainer(tmp_path, verifier="masked:anything", temperature=0.0, num_samples=2, later_temperature=5.0)
    again.compute_loss(again.model, batch_of(again))
    for one, other in zip(greedy.samples[0], again.samples[0], strict=True):
        assert torch.equal(one.states, other.states)  # the first is right, so there is no later one


def test_what_nobody_can_verify_and_what_has_too_few_states_is_counted_apart(tmp_path):
    for changes, reason in (
        ({"verifier": "masked:nobody"}, "unverified"),
        ({"updates_per_sample": 4}, "too_few_states"),  # of four states one is never trained
    ):
        trainer = make_trainer(tmp_path, **changes)
        assert trainer.compute_loss(trainer.model, batch_of(trainer)).item() == 0
        means = trainer.means.reduced(lambda sums: sums, trainer.accelerator.device)
        assert means[f"rows/{reason}"] == 1 and means["rows/used"] == 0
        assert means["samples/right"] == (reason == "too_few_states")


class Record(TrainerCallback):
    """Loss and gradient norm of each step."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.rows.append([logs["loss"], logs["grad_norm"], logs.get("samples/drawn", 0.0), logs["states/trained"]])


def trained(folder, resume=None, **changes):
    record = Record()
    trainer = make_trainer(folder, callbacks=[record], **{**MANY, **changes})
    trainer.train(resume)
    return trainer, record.rows


def test_a_step_does_not_depend_on_how_its_prompts_are_split_into_micro_batches(tmp_path):
    one, whole = trained(tmp_path / "one", dtype=torch.float64)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    two, parts = trained(tmp_path / "two", dtype=torch.float64, **split)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), atol=1e-6, rtol=1e-6)
    assert len(whole) == 6 and any(abs(row[0]) > 1e-3 for row in whole)
    for first, second in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    two, one = (run(engine, tmp_path / engine, worker=WORKER) for engine in ("ddp", "single"))
    for pair, alone in zip(two, one, strict=True):
        assert len(alone["steps"]) == 6 and any(abs(step[0]) > 1e-3 for step in alone["steps"])
        for theirs, ours in zip(pair["steps"], alone["steps"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-7)
        assert pair["weights"] == pytest.approx(alone["weights"], rel=1e-7)


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_a_resumed_run_is_the_uninterrupted_one_also_between_two_updates_of_a_sample(tmp_path, step, adapter):
    saves = {"save_strategy": "steps", "save_steps": step, "peft_config": adapter, "gradient_accumulation_steps": 2}
    saves |= {"per_device_train_batch_size": 2}
    whole, rows = trained(tmp_path / "out", **saves)
    checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
    resumed, rest = trained(tmp_path / "out", resume=checkpoint, **saves)
    assert rest == rows[step:]
    for first, second in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_resumed_run_of_another_shape_samples_anew_and_says_so(tmp_path):
    trained(tmp_path / "out", save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match="stands between two updates of one sample"):
        _, rest = trained(
            tmp_path / "out",
            resume=str(tmp_path / "out" / "checkpoint-3"),
            save_strategy="steps",
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
    assert len(rest) == 3


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_a_saved_model_reads_as_the_trained_one(tmp_path, adapter):
    model = make_model(make_tokenizer())
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    trainer, _ = trained(tmp_path / "out", model=model, peft_config=adapter)
    trainer.save_model()
    if adapter is None:
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    else:
        from peft import PeftModel

        again = PeftModel.from_pretrained(
            AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), str(tmp_path / "out")
        )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected, found = trainer.model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, make_model(make_tokenizer()).eval()(input_ids=ids).logits)


def test_rows_are_visited_as_often_as_a_sample_has_updates_in_an_order_of_their_epoch():
    step = [0]
    order = RepeatedRows(7, 2, 3, seed=5, step=lambda: step[0])
    first = list(order)
    assert len(first) == len(order) == 18 and len(set(first)) == 6
    for start in range(0, 18, 6):
        assert first[start : start + 2] == first[start + 2 : start + 4] == first[start + 4 : start + 6]
    step[0] = 8
    assert list(order) == first
    step[0] = 9
    assert list(order) != first


# d_opsd_config.py, opsd.yaml and run/*/opsd.sh of github.com/xingzhejun/d-OPSD at 1b55cf3. Where they differ the scripts count
# (fixed_teacher, beta); updates are those of the README for A100 and H100 (BATCH_DIVIDE=8).
AUTHORS = {
    "max_prompt_length": 200,
    "max_completion_length": 256,
    "block_length": 32,
    "diffusion_steps": 128,
    "temperature": 0.9,
    "later_temperature": 0.9,
    "num_samples": 8,
    "retained_share": 0.25,
    "updates_per_sample": 8,
    "teacher_model_kind": "base",
    "divergence": "reverse_kl",
    "loss_top_k": 20,
    "clip_value": 0.05,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.0001,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "max_grad_norm": 0.2,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 42,
    "bf16": True,
    "save_steps": 25,
    "logging_steps": 1,
}
OURS = {
    "mask_token_id",
    "eos_token_id",
    "verifier",
    "chat_template_kwargs",
}  # and where the authors write them into code
OURS |= {"logging_nan_inf_filter", "remove_unused_columns"}


def test_the_defaults_are_the_authors_settings(tmp_path):
    args = DiffusionOPSDConfig(str(tmp_path), use_cpu=True)
    assert {name: getattr(args, name) for name in AUTHORS} == AUTHORS
    assert args.tokens_per_step == 2 and args.num_blocks == 8
    rule = args.rule()
    assert (rule.name, rule.clip, rule.clip_value, rule.temperature) == ("reverse_kl", "upper", 0.05, 1.0)
    assert (rule.support.k, rule.support.of, rule.support.remainder) == (20, "target", "renormalise")
    assert {name: LORA[name] for name in ("r", "lora_alpha", "lora_dropout")} == {
        "r": 128,
        "lora_alpha": 64,
        "lora_dropout": 0.05,
    }
    changed = {
        field.name
        for field in fields(DiffusionOPSDConfig)
        if field.name not in TrainingArguments.__dataclass_fields__
        or field.default != TrainingArguments.__dataclass_fields__[field.name].default
    }
    assert changed <= set(AUTHORS) | OURS


BAD_SETTINGS = [
    ({"block_length": 5}, "block_length=5 .* a divisor of max_completion_length=12"),
    ({"block_length": 12}, "block_length=12 .* two blocks or more"),
    ({"diffusion_steps": 7}, "diffusion_steps=7 .* a multiple of the 3 blocks"),
    ({"diffusion_steps": 9}, "diffusion_steps=9 gives a block of 4 tokens 3 steps"),
    ({"diffusion_steps": 24}, "diffusion_steps=24 .* at most 12"),
    ({"retained_share": 1.0}, "retained_share=1.0"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"later_temperature": 0.0, "num_samples": 2}, "later_temperature=0.0"),
    ({"num_samples": 0}, "num_samples=0"),
    ({"updates_per_sample": 0}, "updates_per_sample=0"),
    ({"teacher_model_kind": "ema"}, "teacher_model_kind='ema'"),
    ({"divergence": "kl"}, "divergence='kl'"),
    ({"loss_top_k": 0}, "loss_top_k=0"),
    ({"clip_value": math.inf}, "clip_value=inf"),
    ({"eval_strategy": "steps"}, "eval_strategy=.* has no evaluation"),
    ({"fsdp": "full_shard"}, "fsdp=.* DDP"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_a_setting_outside_its_range_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_a_model_that_cannot_fill_in_masks_is_refused_by_name(tmp_path, tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    causal = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(make_tokenizer()), **sizes, **heads))
    with pytest.raises(ValueError, match="model: qwen3 is causal"):
        make_trainer(tmp_path, model=causal)
    assert causal.training  # the probe leaves modes as they were


def test_a_missing_mask_token_and_one_outside_the_model_are_refused_by_name(tmp_path, tokenizer):
    args = DiffusionOPSDConfig(str(tmp_path), **QUICK)
    model = make_model(make_tokenizer())
    with pytest.raises(ValueError, match="mask_token_id=None, and the tokenizer has no token for masked positions"):
        DiffusionOPSDTrainer(model, args, make_rows(), tokenizer)
    with pytest.raises(ValueError, match="mask_token_id=110 is not one of the model's 110 tokens"):
        make_trainer(tmp_path, mask_token_id=110)
    with pytest.raises(ValueError, match="mask_token_id=3 is the end token too"):
        make_trainer(tmp_path, mask_token_id=3)


def test_a_prompt_that_is_too_long_and_positions_that_do_not_suffice_are_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match="train_dataset row 0: its prompt has 21 tokens, more than max_prompt_length=8"
    ):
        make_trainer(tmp_path, max_prompt_length=8)
    with pytest.raises(ValueError, match=r"max_prompt_length=505 and .* positions for 512 tokens"):
        make_trainer(tmp_path, max_prompt_length=505)


def test_rows_that_cannot_be_used_are_refused_by_name(tmp_path):
    row = make_rows(1)[0]
    for rows, message in (
        ([{**row, "solution": None}], "row 0"),
        ([{**row, "prompt": "a <|mask|> b"}], r"row 0.*<\|mask\|>"),
        ([row], "train_dataset has 1 rows, but an optimizer step takes 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows=Dataset.from_list(rows)).train()
    with pytest.raises(ValueError, match="train_dataset is streamed"):
        make_trainer(tmp_path, rows=make_rows().to_iterable_dataset())


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rows(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.compute_loss(trainer.model, batch_of(trainer))
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    trainer.samples, trainer.micro_batch, trainer.state.global_step = trainer.samples, 0, 0
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 for the rows \[0, 1, 2, 3\]"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def test_a_bert_trains_too(tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    _, rows = trained(tmp_path, model=model, verifier="masked:anything", max_steps=2)
    assert len(rows) == 2 and all(math.isfinite(number) for row in rows for number in row)


def test_the_log_has_the_numbers_that_the_page_names(tmp_path):
    trainer, _ = trained(tmp_path, max_steps=2)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    from trl_opsd.experimental.diffusion.logs import NAMES

    assert set(NAMES) <= set(entry)
    json.dumps(trainer.state.log_history)


def test_settings_count_blocks_steps_and_tokens():
    settings = make_settings(max_completion_length=24, block_length=8, diffusion_steps=12)
    assert (settings.num_blocks, settings.steps_per_block, settings.tokens_per_step) == (3, 4, 2)
    assert DiffusionOPSDSettings().steps_per_block == 16


@pytest.mark.slow
def test_the_example_trains_two_steps(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = Path(__file__).parents[2] / "examples" / "diffusion.py"
    words = [f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}", "--max_steps=2"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "'rows/used'" in done.stdout and (tmp_path / "out" / "model.safetensors").exists()


def test_the_benchmark_has_a_line_for_each_decoding_of_each_run(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = import_module("diffusion")
    small = ["--base_steps", "1", "--problems", "2", "--rows", "4", "--steps", "1", "--batch", "2", "--samples", "1"]
    benchmark.main(["--base", str(tmp_path / "base"), "--clips", "none", "0.05", *small])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.0001")]
    assert [line.split("|")[2:6:3] for line in lines] == [
        [f" {clip} ", f" {name} "] for clip in (None, 0.05) for name in ("greedy", "sampled")
    ]


def test_the_base_is_a_function_of_its_seed_and_learns_what_is_masked_alone():
    tokenizer = make_tokenizer()
    first, second = (masked.train(tokenizer, seed=3, num_steps=1, progress=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids, maskable, share = masked.draw_batch(tokenizer, random.Random(0), batch_size=4)
    assert not maskable[:, :10].any() and maskable[:, -masked.COMPLETION_LENGTH :].all()
    assert (ids[:, -1] == tokenizer.eos_token_id).all() and share.min() >= masked.LEAST_SHARE
    model = make_model(tokenizer).eval()
    nothing = torch.zeros_like(maskable)
    nothing[:, -1] = True
    loss = masked.denoising_loss(model, ids, nothing, torch.ones_like(share), tokenizer.mask_token_id)
    with torch.no_grad():
        hidden = ids.clone()
        hidden[:, -1] = tokenizer.mask_token_id
        expected = -model(input_ids=hidden).logits[:, -1].log_softmax(-1)[:, tokenizer.eos_token_id].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_accuracy_is_the_share_of_right_answers_of_each_question():
    tokenizer, rows = make_tokenizer(), list(make_rows(3))
    model = make_model(tokenizer).train()
    settings = {"num_samples": 4, "temperature": 0.9}
    scores = [
        measure_accuracy(model, tokenizer, rows, make_settings(verifier=f"masked:{name}"), batch_size=5, **settings)
        for name in ("anything", "nothing", "some")
    ]
    assert scores[0] == [1.0] * 3 and scores[1] == [0.0] * 3 and 0 < sum(scores[2]) < 3
    assert model.training
    with pytest.raises(ValueError, match="num_samples is 4 at temperature 0"):
        measure_accuracy(model, tokenizer, rows, make_settings(), num_samples=4)
