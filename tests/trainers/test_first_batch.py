# SPDX-License-Identifier: Apache-2.0
"""A run with too few rows for a batch would train zero steps: it is refused, with both numbers, and saves nothing."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset, IterableDataset
from launching import TORCHRUN
from packaging.version import Version

from trl_opsd import OGLSSDConfig, OGLSSDTrainer, OPSDTrainer, PurifiedOPSDConfig, PurifiedOPSDTrainer
from trl_opsd.commands import cli
from trl_opsd.demo import build_rows, model_path
from trl_opsd.trainers.checks import check_fills_a_batch, check_trained

streams = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.9"), reason="GRPOTrainer takes streamed datasets since TRL 1.9"
)
TRAINERS = [
    (OPSDTrainer, None, {}),
    (OGLSSDTrainer, OGLSSDConfig, {"num_generations": 2, "distillation_length": 8}),
    (PurifiedOPSDTrainer, PurifiedOPSDConfig, {}),
]


@pytest.fixture
def build(make_model, make_args, tokenizer):
    def build(rows, trainer_class=OPSDTrainer, config_class=None, **settings):
        args = make_args(config_class, **settings)
        return trainer_class(model=make_model(), args=args, train_dataset=rows, processing_class=tokenizer)

    return build


@pytest.mark.parametrize(("trainer_class", "config_class", "settings"), TRAINERS)
def test_fewer_rows_than_a_generation_batch_are_refused_with_both_numbers(
    build, dataset, trainer_class, config_class, settings
):
    group = settings.get("num_generations", 1)
    trainer = build(dataset.select(range(3)), trainer_class, config_class, gradient_accumulation_steps=4, **settings)
    told = rf"has 3 rows, but a generation batch takes {16 // group} prompts .*=4 x 1 process x .*=4 / .*={group}\)"
    with pytest.raises(ValueError, match=told):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "group", "told"),
    [(7, 1, "to 1."), (8, 1, "to 2."), (3, 2, "to 1."), (3, 1, "per_device"), (8, 8, "to 7.")],
)
def test_the_fix_that_is_offered_gives_a_batch_that_the_rows_fill(make_args, dataset, rows, group, told):
    settings = {"gradient_accumulation_steps": 8, "num_generations": group, "per_device_train_batch_size": 4}
    if group == 8:
        settings |= {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 16}
        rows = 14
    with pytest.raises(ValueError) as caught:
        check_fills_a_batch(make_args(**settings), dataset.select([0] * rows))
    assert told in str(caught.value).split("rows, or ")[1]
    steps = re.search(r"to (\d+)\.$", str(caught.value))
    if steps is not None:
        check_fills_a_batch(
            make_args(**{**settings, "gradient_accumulation_steps": int(steps[1])}), dataset.select([0] * rows)
        )


def test_a_batch_that_is_just_full_trains(build, dataset):
    trainer = build(dataset)
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.state.global_step == 2


@streams
def test_a_stream_with_too_few_rows_is_refused_as_one_of_known_length_is(build, dataset):
    stream = IterableDataset.from_generator(lambda: iter([*dataset.select(range(3))]))
    with pytest.raises(ValueError, match=r"train_dataset has 3 rows, but a generation batch takes 4 prompts"):
        build(stream).train()


@streams
def test_a_run_that_made_no_step_is_an_error_even_where_nothing_foresaw_it(build, dataset, monkeypatch):
    monkeypatch.setattr("trl_opsd.trainers.self_distillation.check_fills_a_batch", lambda args, dataset: None)
    trainer = build(dataset.select(range(3)))
    with pytest.raises(ValueError, match="ended without an optimizer step"):
        trainer.train()


def test_a_run_that_made_steps_is_none():
    check_trained(SimpleNamespace(global_step=1))


@pytest.mark.parametrize(
    ("drop_last", "packing", "refused"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_trainer_without_generation_batches_needs_a_full_batch_only_where_it_drops_the_last(
    drop_last, packing, refused
):
    args = SimpleNamespace(per_device_train_batch_size=4, world_size=2, dataloader_drop_last=drop_last, packing=packing)
    rows = Dataset.from_list([{"messages": []}] * 7)
    if not refused:
        check_fills_a_batch(args, rows)
        return
    with pytest.raises(ValueError, match=r"7 rows, but a batch takes 8 .*=4 on 2 processes.*Give at least 8 rows"):
        check_fills_a_batch(args, rows)


@pytest.fixture
def words(tmp_path):
    """A function that gives the words of a quick run on some of the demo's rows."""

    def words(num_rows, *more, sampled=True):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in build_rows("train", num_rows)))
        settings = ["--max_steps=2", "--bf16=false", "--use_cpu=true", "--report_to=none"]
        settings += ["--max_completion_length=8"] if sampled else []
        names = [f"--dataset_name={data}", f"--model_name_or_path={model_path()}", f"--output_dir={tmp_path / 'out'}"]
        return [*names, *settings, *more]

    return words


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("opsd", []),
        ("ogls-sd", ["--num_generations=2", "--distillation_length=8"]),
        ("purified-opsd", []),
        ("grpo", ["--num_generations=2"]),
        ("sft", ["--dataloader_drop_last=true"]),
    ],
)
def test_the_command_refuses_before_a_model_is_loaded_and_saves_nothing(
    words, tmp_path, capsys, name, more, monkeypatch
):
    for loader in ("trl.GRPOTrainer.__init__", "trl.SFTTrainer.__init__"):
        monkeypatch.setattr(loader, lambda *args, **kwargs: pytest.fail("a trainer was made"))
    more = ["--per_device_train_batch_size=8", "--gradient_accumulation_steps=4", *more]
    assert cli.main([name, *words(2, *more, sampled=name != "sft")]) == 2
    assert "train_dataset has 2 rows, but a" in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*")]


def test_the_dry_run_counts_the_processes_of_the_recipe(words, capsys):
    size = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=2", "--num_processes=2"]
    assert cli.main(["dry-run", "opsd", *words(16, *size)]) == 0
    assert cli.main(["dry-run", "opsd", *words(15, *size)]) != 0
    told = "15 rows, but a generation batch takes 16 prompts (per_device_train_batch_size=4 x 2 processes x"
    assert told in "".join(capsys.readouterr())


@pytest.mark.slow
def test_two_processes_refuse_what_one_would_train_and_save_nothing(words, tmp_path):
    size = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*TORCHRUN, "-m", "trl_opsd.commands.train", "opsd", *words(7, *size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "7 rows, but a generation batch takes 8 prompts (per_device_train_batch_size=4 x 2 processes" in done.stderr
    assert not [*(tmp_path / "out").glob("*")]
    one = subprocess.run(
        [sys.executable, "-m", "trl_opsd.commands.train", "opsd", *words(7, *size)],
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert one.returncode == 0 and (tmp_path / "out" / "model.safetensors").exists()
