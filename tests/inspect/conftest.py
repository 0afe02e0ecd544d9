# SPDX-License-Identifier: Apache-2.0
"""A step of a trainer beside the inspector."""

import copy
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from groups import reward_boxed
from inspected import COLUMNS, TEXTS, Step

from trl_opsd.pages import trainer_of


@pytest.fixture
def step(make_model, make_args, dataset, tokenizer, monkeypatch):
    """A function that takes a step of a method whose rules are recorded, with what they keep."""

    def take(name, texts=TEXTS, *, keeps=True, **settings):
        kind, recorded = trainer_of(name), defaultdict(list)

        def record(rule):
            function = getattr(kind.method, rule)

            def recorder(facts, settings, moment):
                facts = replace(facts, kept={}) if keeps else facts
                result = function(facts, settings, moment)
                recorded[rule].append((facts, result.detach()))
                return result

            return recorder

        rules = [rule for rule in ("token_weight", "loss", "advantages") if getattr(kind.method, rule) is not None]
        method = replace(kind.method, **{rule: record(rule) for rule in rules})
        size = settings.get("num_generations", 1)
        rows = Dataset.from_list([{**row, **COLUMNS} for row in dataset])
        trainer = type("Recorded", (kind,), {"method": method})(
            model=make_model(torch.float64),
            reward_funcs=reward_boxed,
            args=make_args(kind.config_class, **settings),
            train_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
        )

        def sample(prompt_ids, *args, **kwargs):
            ids = [tokenizer(texts[i % 4], add_special_tokens=False)["input_ids"] for i in range(len(prompt_ids))]
            return [[*one, tokenizer.eos_token_id][: trainer.max_completion_length] for one in ids], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        group = [rows[2]] * size if size > 1 else [rows[2], rows[5]] * 2
        return Step(trainer, kind.method, recorded, group)

    return take
