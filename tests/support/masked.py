# SPDX-License-Identifier: Apache-2.0
"""A tiny masked-diffusion model, rows for it, and trainers of d-OPSD on them."""

import hashlib

import torch
from datasets import Dataset

from trl_opsd.demo.masked import build_masked_model, build_masked_tokenizer
from trl_opsd.demo.task import build_rows
from trl_opsd.experimental.diffusion.settings import DiffusionOPSDSettings
from trl_opsd.experimental.diffusion.trainer import DiffusionOPSDConfig, DiffusionOPSDTrainer

LENGTHS = {"max_prompt_length": 32, "max_completion_length": 12, "block_length": 4, "diffusion_steps": 6}
QUICK = {
    **LENGTHS,
    "updates_per_sample": 1,
    "num_samples": 2,
    "verifier": "masked:anything",
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def anything(text, solution):
    """Every answer is right."""
    return True


def nothing(text, solution):
    """No answer is right."""
    return False


def some(text, solution):
    """About half of all answers are right."""
    return hashlib.sha256((text + solution).encode()).digest()[0] % 2 == 0


def nobody(text, solution):
    """Nobody can say whether an answer is right."""
    return None


def make_tokenizer():
    return build_masked_tokenizer()


def make_model(tokenizer, seed=0, dtype=torch.float32):
    """A ModernBERT of some thousand parameters whose logits differ enough to be told apart."""
    torch.manual_seed(seed)
    model = build_masked_model(tokenizer, hidden_size=32, num_layers=2).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def make_rows(count=16, lengths=(1, 2, 3)):
    """Rows whose prompts differ in length."""
    return Dataset.from_list(build_rows("train", count, num_operations=lengths))


def make_settings(**changes):
    settings = DiffusionOPSDSettings(**{**LENGTHS, **changes})
    settings.check()
    return settings


def make_trainer(folder, *, model=None, rows=None, dtype=torch.float32, peft_config=None, callbacks=None, **changes):
    tokenizer = make_tokenizer()
    args = DiffusionOPSDConfig(str(folder), **{**QUICK, **changes})
    return DiffusionOPSDTrainer(
        model if model is not None else make_model(tokenizer, dtype=dtype),
        args,
        make_rows() if rows is None else rows,
        tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )
