# SPDX-License-Identifier: Apache-2.0
"""The three trainers over a real vLLM engine in their own process (`vllm_mode="colocate"`), without a GPU."""

import copy

import pytest
import torch
from peft import LoraConfig

pytest.importorskip("vllm", reason="vllm is not installed; `make test-vllm` makes an environment that has it")

from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE, build_dataset, model_path

LONGEST = 24  # the demo's model writes 27 tokens on average, so that some rollouts are cut and some are not
GROUP_SIZES = {OPSDTrainer: 1, OGLSSDTrainer: 4, PurifiedOPSDTrainer: 1}
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])}
# Engine and transformers multiply in different orders, both in float32.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def build(engine, monkeypatch, tmp_path):
    """A function that makes a trainer whose engine is vLLM's, and notes what that engine was asked and gave."""

    def build(trainer_class=OPSDTrainer, peft_config=None, **settings):
        monkeypatch.setattr(vllm_generation, "LLM", engine)
        defaults = {
            "output_dir": str(tmp_path),
            "use_vllm": True,
            "vllm_mode": "colocate",
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": GROUP_SIZES[trainer_class],
            "max_completion_length": LONGEST,
            "distillation_length": None,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "max_steps": 3,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "teacher_prompt_template": TEACHER_PROMPT_TEMPLATE,
            "teacher_chat_template_kwargs": {"enable_thinking": False},
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
        }
        if "reference_prompt_template" in trainer_class.config_class.__dataclass_fields__:
            defaults["reference_prompt_template"] = REFERENCE_ONLY_TEMPLATE
        trainer = trainer_class(
            model=model_path(),
            args=trainer_class.config_class(**{**defaults, **settings}),
            train_dataset=build_dataset("train", 16),
            peft_config=peft_config,
        )
        trainer.outputs = []
        generate = type(engine.llm).generate

        def note(*args, **kwargs):
            trainer.outputs.append(generate(engine.llm, *args, **kwargs))
            return trainer.outputs[-1]

        monkeypatch.setattr(engine.llm, "generate", note)
        return trainer

    return build


def student_logps(model, batch):
    """Log-probabilities (B, T) of the rollouts under the model as it is, by transformers alone."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -length - 1 : -1]
    return logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]


def train_and_note(trainer, monkeypatch):
    """Train; return per micro-batch the batch and the student's own log-probabilities at that moment."""
    seen, step_loss = [], trainer.step_loss

    def note(model, batch):
        seen.append((batch, student_logps(trainer.model, batch)))
        return step_loss(model, batch)

    monkeypatch.setattr(trainer, "step_loss", note)
    trainer.train()
    return seen


def rows_of(seen):
    """Prompt, completion and sampling log-probabilities of every row of the batches, without padding, sorted."""
    rows = []
    for batch, _ in seen:
        for row in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            own = batch["completion_mask"][row].bool()
            logps = batch["sampling_per_token_logps"][row]
            rows.append((prompt, batch["completion_ids"][row][own].tolist(), logps[own].tolist()))
    return sorted(rows)


def rows_given(outputs):
    """The same from what the engine returned."""
    rows = []
    for output in (one for outputs in outputs for one in outputs):
        sample = output.outputs[0]
        ids = list(sample.token_ids)
        logps = [entry[token].logprob for token, entry in zip(ids, sample.logprobs, strict=True)]
        rows.append((list(output.prompt_token_ids), ids, logps))
    return [(*row[:2], pytest.approx(row[2], rel=1e-6)) for row in sorted(rows)]  # a prompt's rollouts may be equal


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("trainer_class", GROUP_SIZES, ids=lambda cls: cls.__name__)
def test_a_trainer_runs_on_what_the_engine_sampled_with_the_students_weights(
    build, monkeypatch, trainer_class, adapter
):
    trainer = build(trainer_class, **adapter)
    start = copy.deepcopy(trainer.model)
    start.__dict__.pop("forward", None)
    seen = train_and_note(trainer, monkeypatch)
    assert len(trainer.outputs) == len(seen) == 3
    rows, given = rows_of(seen), rows_given(trainer.outputs)
    assert len(rows) == 24
    for row, wanted in zip(rows, given, strict=True):
        assert row == wanted
    lengths = [len(completion) for _, completion, _ in rows]
    assert min(lengths) < LONGEST == max(lengths)
    for batch, logps in seen:  # the weights are the step's own: the engine's numbers are the student's
        own = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["sampling_per_token_logps"][own], logps[own], **CLOSE)
    batch = seen[-1][0]
    own = batch["completion_mask"].bool()
    assert (batch["sampling_per_token_logps"] - student_logps(start, batch))[own].abs().max() > 0.003
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(loss == loss for loss in losses) and any(losses)


def greedy(trainer, prompts):
    """Completions of the engine and of the student by transformers, both without sampling."""
    from vllm import SamplingParams

    llm = trainer.vllm_generation.llm
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=LONGEST), use_tqdm=False)
    by_engine = [list(output.outputs[0].token_ids) for output in outputs]
    by_student = []
    for ids in prompts:
        whole = trainer.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=LONGEST)
        by_student.append(whole[0, len(ids) :].tolist())
    return by_engine, by_student


def prompts_of(trainer, num_prompts=8):
    rows = build_dataset("test", num_prompts)
    return [
        trainer.tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, enable_thinking=False, return_dict=True
        )["input_ids"]
        for row in rows
    ]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_a_sync_makes_the_engine_write_what_the_changed_student_writes(build, adapter):
    trainer = build(**adapter)
    trainer.vllm_generation.sync_weights()
    prompts = prompts_of(trainer)
    before, student = greedy(trainer, prompts)
    assert before == student
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.5 if adapter else 0.1)
    stale, changed = greedy(trainer, prompts)
    assert stale == before != changed
    trainer.vllm_generation.sync_weights()
    after, student = greedy(trainer, prompts)
    assert after == student == changed


@pytest.mark.parametrize(
    ("settings", "num_syncs"),
    [({}, 4), ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 2), ({"num_iterations": 2}, 2)],
    ids=["every step", "two steps a generation", "two iterations"],
)
def test_weights_are_synced_once_a_generation(build, monkeypatch, settings, num_syncs):
    trainer = build(max_steps=4, **settings)
    calls, sync = [], trainer.vllm_generation.sync_weights
    monkeypatch.setattr(
        trainer.vllm_generation, "sync_weights", lambda: (calls.append(trainer.state.global_step), sync())
    )
    seen = train_and_note(trainer, monkeypatch)
    assert len(calls) == len(trainer.outputs) == num_syncs
    for batch, logps in seen[:: len(seen) // num_syncs]:  # the first batch of every generation
        own = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["sampling_per_token_logps"][own], logps[own], **CLOSE)


def test_the_frozen_teacher_of_an_adapter_is_the_initial_model_after_merging(build, monkeypatch):
    trainer = build(**LORA)
    base = AutoModelForCausalLM.from_pretrained(model_path())
    train_and_note(trainer, monkeypatch)
    ids = torch.tensor([prompts_of(trainer, 1)[0]])
    with torch.no_grad(), trainer.teacher.active():
        teacher = trainer.model(input_ids=ids).logits
        # TRL adds the adapter to the weights for the engine and takes it off again, which rounds.
        torch.testing.assert_close(teacher, base(input_ids=ids).logits, rtol=0, atol=1e-3)
    with torch.no_grad():
        assert (trainer.model(input_ids=ids).logits - teacher).abs().max() > 1e-2


def test_with_a_reward_in_the_loss_trls_correction_finds_engine_and_student_alike(build, monkeypatch):
    trainer = build(reward_weight=0.5, num_generations=4, max_steps=2)
    seen = train_and_note(trainer, monkeypatch)
    for batch, _ in seen:
        own = batch["completion_mask"].bool()
        assert (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[own].abs().max() < 1e-4
        torch.testing.assert_close(
            batch["importance_sampling_ratio"], torch.ones_like(batch["importance_sampling_ratio"]), rtol=0, atol=1e-2
        )


def test_an_evaluation_samples_from_the_engine(build):
    trainer = build(max_steps=1)
    trainer.train()
    metrics = trainer.evaluate(eval_dataset=build_dataset("test", 8))
    assert metrics["eval_loss"] == metrics["eval_loss"]
    assert len(trainer.outputs) == 2
