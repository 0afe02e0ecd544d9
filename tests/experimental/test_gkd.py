# SPDX-License-Identifier: Apache-2.0
"""OPSDGKDTrainer: OPSD's numbers on the same rollouts, and on given answers those of a hand computation."""

import ast
import copy
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from launching import run
from peft import LoraConfig
from steps import EXACT, forward_kl_terms, ids_of, logits_of, loss_of_rows, make_trainer, teacher_prompt
from transformers import Qwen3ForCausalLM

from trl_opsd import OPSDGKDConfig, OPSDGKDTrainer, OPSDTrainer, UnsupportedTRLError
from trl_opsd._trl import versions
from trl_opsd.experimental import gkd
from trl_opsd.methods import OPSD, Method
from trl_opsd.teacher.contexts import TeacherContext

WORKER = str(Path(__file__).parents[1] / "support" / "gkd_worker.py")
CLIP = 0.05


@pytest.fixture
def rows(dataset):
    """The rows of the other trainers' tests as conversations; no answer is its row's solution."""
    texts = ("1+2=3", "so 4", "wait, 10 it is", "a")
    return Dataset.from_list(
        [
            {
                "messages": [*row["prompt"], {"role": "assistant", "content": texts[index % 4]}],
                "solution": row["solution"],
            }
            for index, row in enumerate(dataset)
        ]
    )


@pytest.fixture
def make_gkd_args(tmp_path):
    def make(config_class=OPSDGKDConfig, **overrides):
        settings = {
            "output_dir": str(tmp_path / "gkd"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "max_new_tokens": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            **overrides,
        }
        return config_class(**settings)

    return make


@pytest.fixture
def build(make_model, make_gkd_args, rows, tokenizer):
    def build(trainer_class=OPSDGKDTrainer, model=None, **settings):
        names = ("peft_config", "eval_dataset", "train_dataset", "teacher_model", "callbacks")
        keywords = {"train_dataset": rows} | {name: settings.pop(name) for name in names if name in settings}
        return trainer_class(
            model=model if model is not None else make_model(torch.float64),
            args=make_gkd_args(**settings),
            processing_class=copy.deepcopy(tokenizer),
            **keywords,
        )

    return build


def as_sampled(trainer, batch, completions):
    """The batch that TRL's `training_step` makes of `generate`'s output, padded on the right as that is."""
    pad = trainer.tokenizer.pad_token_id
    width = max(map(len, completions))
    tail = torch.tensor([ids + [pad] * (width - len(ids)) for ids in completions])
    sequences = torch.cat([batch["prompts"], tail], dim=1)

    class Sampler:
        @staticmethod
        def generate(**kwargs):
            return type("Output", (), {"sequences": sequences})()

    names = ("input_ids", "attention_mask", "labels")
    made = trainer.generate_on_policy_outputs(Sampler, batch, trainer.generation_config)
    return {**batch, **dict(zip(names, made, strict=True))}


def gradient(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def hand_loss(trainer, rows, answers, clip=None):
    """Mean per-token divergence from raw logits, one unpadded row at a time, with autograd."""
    model, args = copy.deepcopy(trainer.model), trainer.args
    model.__dict__.pop("forward")
    total, count = 0.0, 0
    for row, answer in zip(rows, answers, strict=True):
        *prompt, _ = row["messages"]
        student = ids_of(trainer.tokenizer, prompt, **args.chat_template_kwargs)
        view = teacher_prompt(args, {"prompt": prompt, "solution": row["solution"]})
        teacher = ids_of(trainer.tokenizer, view, **args.teacher_chat_template_kwargs)
        target = logits_of(model, teacher, answer).detach()
        terms = forward_kl_terms(logits_of(model, student, answer), target, args.temperature)
        total = total + (terms.clamp(max=CLIP) if clip else terms).sum()
        count += len(answer)
    return total / count, model


def answers_of(trainer, rows):
    tokenizer = trainer.tokenizer
    texts = [row["messages"][-1]["content"] for row in rows]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_reduction": "sequence", "clip": None},
        {"num_loss_tokens_to_skip": 1, "distillation_length": 3},
        {"divergence": "jsd", "prompt_template": "Solve {prompt}"},
    ],
    ids=["defaults", "sequence", "a-part-of-each", "jsd-and-template"],
)
def test_on_given_rollouts_loss_and_gradient_are_those_of_opsd(
    build, make_model, make_args, dataset, tokenizer, rows, given_rollouts, settings
):
    opsd = given_rollouts(make_trainer(make_model, make_args, dataset, tokenizer, OPSDTrainer, **settings))
    wanted, _ = loss_of_rows(opsd, dataset.select([0, 3, 5, 7]))
    wanted.backward()
    ours = build(lmbda=1.0, **settings)
    ours.model.train()
    batch = ours.data_collator([rows[index] for index in (0, 3, 5, 7)])
    pairs = zip(batch["prompts"], batch["prompt_attention_mask"].bool(), strict=True)
    prompts = [ids[mask].tolist() for ids, mask in pairs]
    completions = [opsd._generate_single_turn([ids])[0][0] for ids in prompts]
    assert len({len(ids) for ids in completions}) > 1 and len({len(ids) for ids in prompts}) > 1
    loss = ours.compute_loss(ours.model, as_sampled(ours, batch, completions))
    loss.backward()
    assert abs(loss.item()) > 1e-3 and loss.item() == pytest.approx(wanted.item(), **EXACT)
    reference = gradient(opsd.model)
    assert max(value.abs().max() for value in reference.values()) > 1e-4
    for name, value in gradient(ours.model).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("clip", [None, "upper"])
def test_on_given_answers_loss_and_gradient_equal_a_hand_computation_from_raw_logits(build, rows, clip):
    trainer = build(lmbda=0.0, clip=clip, clip_value=CLIP)
    trainer.model.train()
    picked = [rows[index] for index in (0, 2, 5, 7)]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(picked))
    loss.backward()
    wanted, model = hand_loss(trainer, picked, answers_of(trainer, picked), clip)
    assert abs(wanted.item()) > 1e-3 and loss.item() == pytest.approx(wanted.item(), **EXACT)
    if clip is None:
        wanted.backward()
        for name, value in gradient(model).items():
            torch.testing.assert_close(gradient(trainer.model)[name], value, rtol=1e-4, atol=1e-6, msg=name)


class SelfTrainer(OPSDGKDTrainer):
    """A teacher that reads exactly what the student reads."""

    method = Method(
        name="self",
        contexts=lambda group, settings, draw: [(TeacherContext("plain", None, anchor=1.0),) for _ in group],
        paper=OPSD.paper,
    )


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_equal_contexts_and_weights_give_loss_and_gradient_zero(build, rows, kind):
    trainer = build(trainer_class=SelfTrainer, clip=None, teacher_model_kind=kind)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)[:4]))
    loss.backward()
    # An average is kept in float32 or wider, so a float64 student's is exact.
    assert abs(loss.item()) < 1e-14
    assert max(value.abs().max() for value in gradient(trainer.model).values()) < 1e-12


def test_padding_and_batch_order_change_nothing(build, rows):
    trainer = build()
    picked = [rows[index] for index in (0, 2, 5, 7)]

    def loss_of(rows):
        return trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).item()

    together, counts = loss_of(picked), [len(ids) for ids in answers_of(trainer, picked)]
    assert loss_of(picked[::-1]) == pytest.approx(together, **EXACT)
    alone = sum(loss_of([row]) * count for row, count in zip(picked, counts, strict=True)) / sum(counts)
    assert len(set(counts)) > 1 and alone == pytest.approx(together, **EXACT)


def test_a_row_without_a_rollout_adds_nothing(build, rows):
    trainer = build()
    batch = trainer.data_collator([rows[0], rows[1]])
    alone = trainer.compute_loss(trainer.model.train(), trainer.data_collator([rows[0]]))
    batch["labels"][1] = -100
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(alone.item(), **EXACT)
    batch["labels"][:] = -100
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0 and all((value == 0).all() for value in gradient(trainer.model).values())


def test_an_optimizer_step_takes_the_mean_of_its_micro_batches(build, rows, monkeypatch):
    """SGD at rate 1 shows the gradient of a step as the weights' move; the micro-batches differ in length."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = build(
        lmbda=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=2, clip=None,
        train_dataset=rows.select([2, 3]), **settings,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    wanted = []
    for index in (2, 3):
        loss, model = hand_loss(trainer, [rows[index]], answers_of(trainer, [rows[index]]))
        loss.backward()
        wanted.append(gradient(model))
    counts = [len(ids) for ids in answers_of(trainer, [rows[2], rows[3]])]
    assert counts[0] != counts[1]
    output = trainer.train()
    for name, value in trainer.model.named_parameters():
        mean = (wanted[0][name] + wanted[1][name]) / 2
        torch.testing.assert_close(before[name] - value.detach(), mean, rtol=1e-4, atol=1e-6, msg=name)
    losses = [hand_loss(trainer_before(trainer, before), [rows[i]], answers_of(trainer, [rows[i]]))[0] for i in (2, 3)]
    assert output.training_loss == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=1e-6)


def trainer_before(trainer, values):
    trainer.model.load_state_dict(values)
    return trainer


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_it_samples_the_share_of_micro_batches_it_is_told_to(build, monkeypatch, lmbda):
    trainer = build(lmbda=lmbda, max_steps=8, gradient_accumulation_steps=1, seed=3)
    sampled = []
    original = OPSDGKDTrainer.generate_on_policy_outputs

    def count(*args):
        sampled.append(1)
        return original(*args)

    monkeypatch.setattr(OPSDGKDTrainer, "generate_on_policy_outputs", staticmethod(count))
    trainer.train()
    assert {0.0: len(sampled) == 0, 0.5: 1 <= len(sampled) <= 7, 1.0: len(sampled) == 8}[lmbda]


def test_a_mixed_run_trains_logs_saves_and_is_read_back(build, make_model, rows, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lmbda": 0.5}
    trainer = build(
        model=make_model(), eval_dataset=rows.select([1, 2]), eval_strategy="steps", eval_steps=2, **settings
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert any((before[name] != value).any() for name, value in trainer.model.named_parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(entry["divergence"] > 0 and "time/teacher_forward" in entry for entry in logs)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and all(entry["eval_divergence"] > 0 for entry in evaluations)
    trainer.save_model(str(tmp_path / "saved"))
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(dict(again.named_parameters())[name], value.detach())
    assert "2601.18734" in (tmp_path / "gkd" / "README.md").read_text()


def test_the_average_of_a_teacher_is_saved_and_read_back(build, make_model):
    settings = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "learning_rate": 1e-2, "lmbda": 0.0}
    whole = build(model=make_model(), max_steps=4, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    second = build(model=make_model(seed=5), max_steps=4, save_strategy="no", **settings)
    second.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    for name, value in whole.teacher.values.items():
        torch.testing.assert_close(second.teacher.values[name], value)
        assert (value != dict(whole.model.named_parameters())[name].detach()).any()


def test_a_damaged_checkpoint_another_model_and_another_run_are_refused(build, make_model):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lmbda": 0.0}
    whole = build(model=make_model(), **settings)
    whole.train()
    folder = Path(whole.args.output_dir)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        build(model=make_model(), **settings).train()
    with pytest.raises(ValueError, match="other weights than the one the run started from"):
        build(model=make_model(seed=5), **settings).train(resume_from_checkpoint=True)
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    resumed = build(model=make_model(), **settings)
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing.*Give .*checkpoint-1"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.warns(UserWarning, match=r"Skipped newer.*optimizer\.pt is missing"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.run.id == whole.run.id and resumed.state.global_step == 2


def test_a_fresh_adapter_is_taught_by_the_model_below_it(build, make_model, rows):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    trainer = build(model=make_model(), peft_config=adapter, learning_rate=1e-2, max_steps=2, lmbda=0.0, clip=None)
    plain = build(model=make_model(), lmbda=0.0, clip=None)
    batch = plain.data_collator(list(rows)[:4])
    wanted = plain.compute_loss(plain.model.train(), copy.deepcopy(batch)).item()
    assert trainer.teacher.adapter_off and not trainer.teacher.values
    first = trainer.compute_loss(trainer.model.train(), batch).item()
    assert first == pytest.approx(wanted, rel=1e-4)
    trainer.train()
    moved = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(value.abs().max() > 0 for value in moved)


def test_bf16_autocast_leaves_the_student_its_gradient_and_its_weights(build, make_model, rows):
    """The average's weights, cast first, must not be taken from autocast's cache for the student's."""
    trainer = build(model=make_model(), bf16=True, lmbda=0.0, teacher_model_kind="ema", clip=None)
    with torch.no_grad():
        for value in trainer.teacher.values.values():
            value.mul_(0.5)
    batch = trainer.data_collator(list(rows)[:4])
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, copy.deepcopy(batch))
    loss.backward()
    names = {name for name, _ in trainer.model.named_parameters()}
    assert set(gradient(trainer.model)) == names
    exact = build(model=make_model(), lmbda=0.0, teacher_model_kind="ema", clip=None)
    with torch.no_grad():
        for value in exact.teacher.values.values():
            value.mul_(0.5)
    wanted = exact.compute_loss(exact.model.train(), batch)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)
    for name, value in gradient(exact.model).items():
        similar = torch.nn.functional.cosine_similarity(gradient(trainer.model)[name].flatten(), value.flatten(), dim=0)
        assert similar > 0.95, name


def test_no_second_copy_of_the_weights_is_made(build):
    trainer = build(teacher_model_kind="live")
    assert sum(weight.numel() for weight in trainer.teacher_model.parameters()) == 1 and not trainer.teacher.values


# Refusals


def changed(row, **columns):
    return Dataset.from_list([{**row, **columns}])


@pytest.mark.parametrize("solution", [None, "", "  "], ids=["None", "empty", "blank"])
def test_a_row_without_a_solution_is_refused(build, rows, solution):
    with pytest.raises(ValueError, match=r"train_dataset row 0: `solution` is .* the teacher reads it"):
        build(train_dataset=changed(rows[0], solution=solution))


def test_a_dataset_without_solutions_is_refused_and_told_how_to_get_them(build, rows):
    with pytest.raises(ValueError, match=r"eval_dataset has no `solution` column .*row\['messages'\]\[-1\]"):
        build(eval_dataset=rows.remove_columns("solution"))
    with pytest.raises(ValueError, match="no `messages` column"):
        build(train_dataset=rows.remove_columns("messages"))


def test_layer_kernels_without_what_they_need_are_refused(build):
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        build(use_liger_kernel=True)


@pytest.mark.parametrize("keep", [1, 0], ids=["no-answer", "empty"])
def test_a_conversation_without_an_answer_is_refused(build, rows, keep):
    with pytest.raises(ValueError, match=r"row 0: `messages` .* ends with an assistant's turn"):
        build(train_dataset=changed(rows[0], messages=rows[0]["messages"][:keep]))


def test_a_text_that_spells_out_a_control_token_is_refused(build, rows):
    trainer = build()
    with pytest.raises(ValueError, match=r"training batch row 0: `solution` spells out '<\|im_end\|>'"):
        trainer.data_collator([{**rows[0], "solution": "4<|im_end|>"}])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"beta": 0.0}, ("beta=0.0", "divergence ('forward_kl' is their 0")),
        ({"seq_kd": True}, ("seq_kd=True", "lmbda")),
        ({"teacher_model_name_or_path": "x"}, ("teacher_model_name_or_path='x'", "teacher_model_kind")),
        ({"clip_value": 0.0}, ("clip_value=0.0",)),
        ({"num_loss_tokens_to_skip": 8}, ("num_loss_tokens_to_skip=8", "max_new_tokens=8")),
        ({"teacher_prompt_template": "{prompt}"}, ("teacher_prompt_template", "{solution}")),
        ({"lmbda": 1.5}, ("lmbda",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_range_or_of_two_models_is_refused(make_gkd_args, settings, told):
    with pytest.raises(ValueError) as raised:
        make_gkd_args(**settings)
    assert all(text in str(raised.value) for text in told)


def test_another_teacher_is_refused(build, make_model):
    with pytest.raises(ValueError, match=r"teacher_model is given to OPSDGKDTrainer: the model itself"):
        build(teacher_model=make_model())
    with pytest.raises(TypeError, match="no argument 'data_colator'"):
        OPSDGKDTrainer(model=make_model(), data_colator=list)


def test_fsdp_is_refused_by_name(build, monkeypatch):
    model, args = build().model, build().args
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP is not supported by OPSDGKDTrainer.*OPSDTrainer"):
        OPSDGKDTrainer(model=model, args=args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("ddp", "zero2")), "zero3"]
)
def test_two_processes_train_as_one(tmp_path, engine):
    given, sampled = run(engine, tmp_path / engine, worker=WORKER)
    (alone, _) = run("single", tmp_path / "single", worker=WORKER)
    assert len(given) == len(sampled) == 3
    for two, one in zip(given, alone, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert all(math.isfinite(value) for step in sampled for value in step)


def test_answers_are_cut_at_their_end_and_prompts_never(build, rows):
    prompt = build().data_collator([rows[2]])["prompts"].size(1)
    trainer = build(max_length=prompt + 2)
    batch = trainer.data_collator([rows[2]])
    assert batch["labels"][0].tolist() == [-100] * prompt + answers_of(trainer, [rows[2]])[0][:2]
    trainer.data_collator.max_length = prompt
    with pytest.raises(ValueError, match=rf"max_length={prompt} leaves nothing of an answer"):
        trainer.data_collator([rows[2]])


# The seam


def test_the_wrapped_names_of_gkd_are_a_frozen_set():
    assert set(versions.GKD_METHODS) == {"compute_loss", "generate_on_policy_outputs", "training_step"}


def test_a_trl_without_them_is_refused_by_name(monkeypatch):
    from trl.experimental.gkd import GKDTrainer

    monkeypatch.setattr(
        GKDTrainer,
        "generate_on_policy_outputs",
        staticmethod(lambda model, inputs, generation_config, pad_token_id=None: None),
    )
    with pytest.raises(UnsupportedTRLError, match=rf"trl {re.escape(trl.__version__)}: .* padding token"):
        versions.gkd_classes()
    monkeypatch.delattr(GKDTrainer, "generate_on_policy_outputs")
    with pytest.raises(UnsupportedTRLError, match="has no generate_on_policy_outputs"):
        versions.gkd_classes()


def test_no_name_of_ours_is_a_private_one_of_trls_gkd():
    from trl.experimental.gkd import GKDTrainer

    taken = {name for name in dir(GKDTrainer) if re.fullmatch("_[a-z].*", name)}
    for owner in GKDTrainer.__mro__:
        if owner.__module__.split(".")[0] in ("trl", "transformers"):
            taken |= set(re.findall(r"\bself\.(_?[a-z]\w*)", inspect.getsource(owner)))
    tree = ast.parse(inspect.getsource(gkd))
    made = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    made |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    overridden = {"__init__", "train", "compute_loss", "log", "data_collator", "model_accepts_loss_kwargs"}
    assert not (made - overridden - {name for name in made if name.startswith("on_")}) & taken
