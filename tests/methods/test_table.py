# SPDX-License-Identifier: Apache-2.0
"""Every method times every property: a new method is a row of `METHODS` and gets the tests for nothing.

Two ranks are one in `tests/engines`, whose cells take the same rows.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from groups import reward_boxed
from steps import EXACT, loss_of_rows

from trl_opsd import OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer

TEXTS = ("so \\boxed{3}", "wait, 10 it is", "a", "it is \\boxed{10} then", "no", "5 or \\boxed{6}")


@dataclass
class Row:
    """A method under test.

    Attributes:
        trainer: its class.
        settings: of its config, where a tiny step needs others than the paper's.
        zero_at_equality: a teacher that reads what the student reads gives loss and gradient 0.
    """

    trainer: type
    settings: dict[str, Any] = field(default_factory=dict)
    zero_at_equality: bool = True


GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 24}
METHODS = {
    "OPSD": Row(OPSDTrainer, {"clip": None}),
    "OPSD in groups with a reward": Row(
        OPSDTrainer, {**GROUPS, "clip": None, "reward_weight": 0.5}, zero_at_equality=False
    ),
    "OGLS-SD": Row(OGLSSDTrainer, {**GROUPS, "clip": None, "distillation_length": 6, "steering_warmup_steps": 0}),
    "Purified OPSD": Row(PurifiedOPSDTrainer, {"decomposition_steps": 0}),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def row(request):
    return request.param


@pytest.fixture
def make(row, make_model, make_args, dataset, tokenizer, monkeypatch):
    """A function that makes the row's trainer, whose rollouts are a function of prompt and copy alone."""

    def make(method=None, **settings):
        owner = row.trainer if method is None else type("Changed", (row.trainer,), {"method": method})
        trainer = owner(
            model=make_model(torch.float64),
            reward_funcs=reward_boxed,
            args=make_args(row.trainer.config_class, **{**row.settings, **settings}),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
        )

        def sample(prompt_ids, *args, **kwargs):
            copies, ids = Counter(), []
            for prompt in map(tuple, prompt_ids):
                text = TEXTS[(len(prompt) + copies[prompt]) % len(TEXTS)]
                copies[prompt] += 1
                ids.append([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            return [own[: trainer.max_completion_length] for own in ids], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        return trainer

    return make


@pytest.fixture
def groups_of(row, dataset):
    """A function from places in the dataset to the rows of their groups."""
    size = row.settings.get("num_generations", 1)
    return lambda *places: [dataset[place] for place in places for _ in range(size)]


def gradients(trainer, rows):
    trainer.model.zero_grad()
    loss, batch = loss_of_rows(trainer, rows)
    loss.backward()
    grads = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([grad.flatten() for grad in grads]).clone(), batch


def on_equal_terms(method):
    """The method with a teacher that reads the student's own prompt in every view."""

    def contexts(*args):
        return [
            tuple(replace(view, template="plain", slot=None, slot_tokens=None, texts=()) for view in views)
            for views in method.contexts(*args)
        ]

    return replace(method, contexts=contexts)


def test_a_step_has_a_gradient(make, groups_of):
    _, gradient, _ = gradients(make(), groups_of(0, 5))
    assert gradient.abs().max() > 1e-5


def test_a_teacher_that_reads_what_the_student_reads_teaches_nothing(row, make, groups_of):
    if not row.zero_at_equality:
        return
    loss, gradient, _ = gradients(make(on_equal_terms(row.trainer.method)), groups_of(0, 5))
    assert abs(loss) < 1e-12 and gradient.abs().max() < 1e-10


def test_order_changes_nothing(make, groups_of):
    one, other = (gradients(make(), groups_of(*places)) for places in ((0, 5), (5, 0)))
    assert one[0] == pytest.approx(other[0], **EXACT)
    torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=1e-9)


def test_padding_and_companions_change_nothing(row, make, groups_of):
    """The loss of two groups is that of each alone, by the counts that each is divided by."""
    trainer = make()
    places = (0, 5)
    together, _, batch = gradients(trainer, groups_of(*places))
    if row.settings.get("reward_weight"):  # TRL's own loss has a denominator of its own
        return
    counts, alone = [], []
    for place in places:
        loss, _, own = gradients(trainer, groups_of(place))
        counts.append(own["num_loss_items"].item())
        alone.append(loss * counts[-1])
    assert batch["num_loss_items"].item() == sum(counts) > 0
    assert together == pytest.approx(sum(alone) / sum(counts), **EXACT)


def test_nothing_that_the_teacher_says_has_a_gradient(make, groups_of):
    trainer = make()
    before = {name: value.clone() for name, value in trainer.teacher.values.items()}
    _, _, batch = gradients(trainer, groups_of(0, 5))
    assert not [name for name, column in batch.items() if torch.is_tensor(column) and column.requires_grad]
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.values.items())


def test_accumulation_changes_nothing(row, make):
    size, weights = row.settings.get("per_device_train_batch_size", 4), []
    for steps in (1, 2, 4):
        trainer = make(
            per_device_train_batch_size=size // steps,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=1e9,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-8)  # TRL's advantages are float32


def test_a_resumed_run_is_the_uninterrupted_one(row, make, tmp_path):
    size = row.settings.get("per_device_train_batch_size", 4)
    settings = {
        "per_device_train_batch_size": size // 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,  # so that step 3 stands in the middle of a generation batch
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }
    whole, resumed = make(**settings), make(**settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        # A micro-batch that was read back lies elsewhere in memory, which may round a product otherwise: by one bit in float64.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14, msg=name)
