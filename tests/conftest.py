# SPDX-License-Identifier: Apache-2.0
"""A tiny real model, its tokenizer and small datasets, made from configs: nothing is downloaded."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "true")  # TRL sends no telemetry from CI

import pytest
import torch
from datasets import Dataset
from groups import SMALL, TEXTS, reward_boxed
from steps import make_trainer
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opsd import OGLSSDTrainer
from trl_opsd.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer):
    """A function that makes a seeded Qwen3 of a few thousand parameters."""

    def make(dtype=torch.float32, seed=0, **overrides):
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "initializer_range": 0.3,  # far enough from uniform that a wrong context shows in the loss
            **overrides,
        }
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**settings)).to(dtype)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model

    return make


@pytest.fixture
def dataset():
    """Eight rows whose prompts and solutions differ in length."""
    rows = []
    for index in range(8):
        chain = "+".join(str(n) for n in range(1, index + 2))
        total = sum(range(1, index + 2))
        prompt = [{"role": "user", "content": f"{chain}=?"}]
        rows.append({"prompt": prompt, "solution": f"{chain} is {total}, so \\boxed{{{total}}}"})
    return Dataset.from_list(rows)


@pytest.fixture
def make_args(tmp_path):
    """A function that makes the config of a quick CPU run."""

    def make(config_class=None, **overrides):
        from trl_opsd import OPSDConfig

        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "max_completion_length": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            **overrides,
        }
        return (config_class or OPSDConfig)(**settings)

    return make


@pytest.fixture
def given_rollouts(monkeypatch):
    """A function that makes a trainer "sample" completions that are a function of the prompt alone."""

    def give(trainer, texts=("1+2=3", "so 4", "wait, 10 it is", "a")):
        tokenizer = trainer.tokenizer

        def sample(prompt_ids, *args, **kwargs):
            completions = []
            for ids in prompt_ids:
                text = texts[len(ids) % len(texts)]
                completion = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                completions.append(completion[: trainer.max_completion_length])
            return completions, None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        return trainer

    return give


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, given_rollouts):
    """A function that makes a trainer of the tiny model."""

    def build(**settings):
        given = settings.pop("given", True)
        trainer = make_trainer(make_model, make_args, dataset, tokenizer, **settings)
        return given_rollouts(trainer) if given else trainer

    return build


@pytest.fixture
def build_group(make_model, make_args, dataset, tokenizer, monkeypatch):
    """A function that makes a trainer whose groups consist of given texts."""

    def build(trainer_class=OGLSSDTrainer, texts=TEXTS, rows=None, reward=reward_boxed, model=None, **settings):
        defaults = SMALL if trainer_class is OGLSSDTrainer else {}
        trainer = trainer_class(
            model=make_model(torch.float64) if model is None else model,
            reward_funcs=reward,
            args=make_args(trainer_class.config_class, **{**defaults, **settings}),
            train_dataset=dataset if rows is None else rows,
            processing_class=copy.deepcopy(tokenizer),
        )

        def sample(prompt_ids, *args, **kwargs):
            ids = [
                tokenizer(texts[i % len(texts)], add_special_tokens=False)["input_ids"] for i in range(len(prompt_ids))
            ]
            return [[*one, tokenizer.eos_token_id][: trainer.max_completion_length] for one in ids], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    return build
