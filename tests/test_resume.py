# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed is the run that was not interrupted, bit by bit, wherever it stopped."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig

from trl_opsd import OGLSSDTrainer, OPSDTrainer
from trl_opsd.checkpoints import MARKER

STEPS = 6
TIMES = ("time/", "step_time", "train_runtime", "per_second", "train_loss", "total_flos")


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, tmp_path):
    """A trainer that samples its rollouts, saves every step and generates a batch for every second."""

    def build(trainer_class=OPSDTrainer, lora=False, seed=0, model=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "teacher_update_rate": 0.3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        }
        return trainer_class(
            model=model or make_model(seed=seed, attention_dropout=0.1),
            args=make_args(trainer_class.config_class, **defaults | settings),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if lora else None,
            reward_funcs=lambda completions, **columns: [float(len(c[0]["content"]) % 2) for c in completions],
        )

    return build


def curve(trainer):
    """Everything that was logged but times."""
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in trainer.state.log_history
    ]


def check_every_resume(build, tmp_path, steps=range(1, STEPS), **settings):
    """Train once, then from each of its checkpoints; logs, weights and the teacher's values are the same."""
    whole = build(**settings)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    wanted = curve(whole)
    assert len(wanted) >= 2 and any(not torch.equal(v, start[n]) for n, v in whole.model.state_dict().items())
    for step in steps:
        torch.manual_seed(99)
        resumed = build(**settings, output_dir=str(tmp_path / "again"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert curve(resumed) == wanted, step
        for (name, a), b in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), (step, name)
        for name, value in whole.teacher.values.items():
            assert torch.equal(value, resumed.teacher.values[name]), (step, name)


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_resumed_from_any_step_is_the_uninterrupted_one(build, tmp_path, kind, lora):
    check_every_resume(build, tmp_path, teacher_model_kind=kind, lora=lora)
