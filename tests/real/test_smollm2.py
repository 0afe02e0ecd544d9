# SPDX-License-Identifier: Apache-2.0
"""A pretrained model: SmolLM2-135M-Instruct trains, with its own tokenizer and template, and says what it said before."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd import OGLSSDConfig, OGLSSDTrainer, OPSDConfig, OPSDTrainer, PurifiedOPSDConfig, PurifiedOPSDTrainer
from trl_opsd.methods import OPSD
from trl_opsd.teacher.contexts import TeacherContext

METHODS = {
    "opsd": (OPSDTrainer, OPSDConfig, {}),
    "ogls-sd": (
        OGLSSDTrainer,
        OGLSSDConfig,
        {"num_generations": 2, "distillation_length": 6, "steering_warmup_steps": 0},
    ),
    "purified-opsd": (PurifiedOPSDTrainer, PurifiedOPSDConfig, {"decomposition_steps": 0}),
}


def rows():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Tom has {n} apples and buys {n + 2} more. How many has he?"}],
                "solution": f"{n}+{n + 2}={2 * n + 2}, so he has \\boxed{{{2 * n + 2}}}.",
            }
            for n in range(1, 5)
        ]
    )


def make(kind, smollm2, folder, **settings):
    owner, config, own = METHODS[kind]
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
        **own,
        **settings,
    }
    return owner(
        model=smollm2,
        args=config(str(folder), **values),
        train_dataset=rows(),
        reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def test_the_model_of_the_package_answers_a_question(smollm2):
    """Read, dequantized and saved again, it still knows what a pretrained model knows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert 134e6 < model.num_parameters() < 135e6 and model.dtype == torch.float32
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].size(1) :])
    assert "Paris" in text


@pytest.mark.parametrize("kind", METHODS)
def test_a_step_moves_the_adapter_and_nothing_else(kind, smollm2, tmp_path):
    trainer = make(kind, smollm2, tmp_path)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    log = trainer.state.log_history[0]
    assert log["divergence"] > 1e-4 and log["grad_norm"] > 0


def test_a_teacher_that_reads_what_the_student_reads_teaches_nothing(smollm2, tmp_path):
    from dataclasses import replace

    def plain(group, settings, moment):
        return [(TeacherContext("plain", None, anchor=1.0),) for _ in group]

    trainer = make("opsd", smollm2, tmp_path, clip=None)
    trainer.method_loss.method = trainer.scorer.method = replace(OPSD, contexts=plain)
    trainer.targets.method = trainer.groups.method = trainer.scorer.method
    trainer.train()
    assert abs(trainer.state.log_history[0]["divergence"]) < 1e-5
