# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused before any training, by name, and the output folder stays as it was."""

import copy
import types

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict, IterableDataset
from packaging.version import Version
from transformers import Gemma3Config, Qwen3Config, T5Config, T5ForConditionalGeneration
from trl import GRPOConfig

from trl_opsd import OPSDTrainer
from trl_opsd.demo.tokenizer import build_tokenizer
from trl_opsd.model.checks import check_engine, check_model_config, check_vocabulary
from trl_opsd.rows.checks import check_dataset, check_rows
from trl_opsd.teacher.contexts import TEACHER_PROMPT_TEMPLATE

streams = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.9"), reason="GRPOTrainer takes streamed datasets since TRL 1.9"
)

USER = {"role": "user", "content": "2+3=?"}
GOOD = {"prompt": [USER], "solution": "\\boxed{5}"}


def good_then(**row):
    """Two rows, the second of which has something else."""
    return Dataset.from_list([GOOD, {**GOOD, **row}])


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, tmp_path):
    """Makes a trainer; holds that a refused one leaves the output folder as it was."""
    earlier = tmp_path / "out" / "checkpoint-7" / "model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier work")

    def build(*, model=None, rows=dataset, processing_class=None, eval_dataset=None, args=None, **settings):
        try:
            return OPSDTrainer(
                model=model if model is not None else make_model(),
                args=args or make_args(**settings),
                train_dataset=rows,
                eval_dataset=eval_dataset,
                processing_class=processing_class or copy.deepcopy(tokenizer),
            )
        finally:
            assert earlier.read_text() == "earlier work"
            assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [earlier]

    return build


ROWS = {
    "no solution column": (
        lambda: Dataset.from_list([{"prompt": [USER]}]),
        "no `solution` column",
        "`dataset.map(lambda row",
    ),
    "no prompt column": (
        lambda: Dataset.from_list([{"solution": "5"}]),
        "no `prompt` column",
        "`dataset.map(lambda row",
    ),
    "empty dataset": (lambda: Dataset.from_list([]), "is empty", "at least one row"),
    "empty with columns": (lambda: Dataset.from_dict({"prompt": [], "solution": []}), "is empty", "one row"),
    "empty solution": (lambda: good_then(solution=""), "row 1: `solution` is empty", "Remove the row"),
    "blank solution": (lambda: good_then(solution=" \n"), "row 1: `solution` is empty", "Remove the row"),
    "no solution in a row": (lambda: good_then(solution=None), "row 1: `solution` is None", "Remove the row"),
    "a number as solution": (
        lambda: Dataset.from_list([{"prompt": [USER], "solution": 5}]),
        "row 0: `solution` is of type int",
        "as text",
    ),
    "an answered prompt": (
        lambda: good_then(prompt=[USER, {"role": "assistant", "content": "5"}]),
        "row 1: `prompt` ends with a 'assistant' turn",
        "'user'",
    ),
    "an empty conversation": (lambda: good_then(prompt=[]), "row 1: `prompt` is list", "Give a string"),
    "an empty text": (
        lambda: Dataset.from_list([{"prompt": " ", "solution": "5"}]),
        "row 0: `prompt` is empty",
        "give",
    ),
    "an empty message": (
        lambda: good_then(prompt=[{"role": "user", "content": ""}]),
        "row 1: the last message's content is not text",
        "non-empty",
    ),
    "a number as prompt": (
        lambda: Dataset.from_list([{"prompt": 5, "solution": "5"}]),
        "`prompt` is int",
        "string",
    ),
    "an image column": (
        lambda: Dataset.from_list([{**GOOD, "image": "x"}]),
        "column `image`",
        "Remove the column",
    ),
    "an images column": (lambda: Dataset.from_list([{**GOOD, "images": ["x"]}]), "column `images`", "Remove"),
    "an image in a message": (
        lambda: Dataset.from_list([{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "solution": "5"}]),
        "row 0: `prompt` holds a part that is not text",
        "Images",
    ),
    "a list": (lambda: [GOOD], "is a list", "Dataset.from_list"),
    "a stream without rows": (
        lambda: IterableDataset.from_generator(lambda: iter(())),
        "is empty",
        "one row",
    ),
    "a stream without solutions": (
        lambda: IterableDataset.from_generator(lambda: iter([{"prompt": [USER]}])),
        "row 0: `solution` is None",
        "reference solution",
    ),
    "a stream without prompts": (
        lambda: IterableDataset.from_generator(lambda: iter([{"solution": "5"}])),
        "row 0: `prompt` is NoneType",
        "string",
    ),
    "a stream with known columns": (
        lambda: Dataset.from_list([{"prompt": [USER]}]).to_iterable_dataset(),
        "no `solution` column",
        "`dataset.map(lambda row",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_training_set_is_refused_by_name_before_training(build, case):
    rows, *told = ROWS[case]
    with pytest.raises(ValueError) as raised:
        check_dataset(rows(), "train_dataset", needs_solution=True)
    direct = str(raised.value)
    assert direct.startswith("train_dataset") and all(text in direct for text in told)
    with pytest.raises(ValueError) as raised:
        build(rows=rows(), max_steps=1)
    assert str(raised.value) == direct


@pytest.mark.parametrize("case", ["no solution column", "empty solution", "an image column", "empty dataset"])
def test_evaluation_sets_are_checked_each_under_its_name(build, dataset, case):
    rows, *told = ROWS[case]
    for given, name in (
        (rows(), "eval_dataset"),
        ({"easy": dataset, "hard": rows()}, "eval_dataset['hard']"),
    ):
        with pytest.raises(ValueError) as raised:
            build(eval_dataset=given)
        assert str(raised.value).startswith(name) and told[0] in str(raised.value)


def test_good_sets_of_every_form_pass(build, dataset):
    build(rows=dataset, eval_dataset={"a": dataset, "b": dataset})
    build(rows=dataset, eval_dataset=DatasetDict({"a": dataset}))
    build(rows=Dataset.from_list([{"prompt": "2+3=", "solution": "5"}]))


@streams
def test_a_good_streamed_set_passes(build, dataset):
    build(rows=dataset.to_iterable_dataset(), max_steps=1)


@pytest.mark.parametrize("form", ["train", "eval"])
def test_a_method_without_references_takes_rows_without_them(form):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "solution": [None, "5"]})
    check_dataset(rows, form, needs_solution=False)
    check_dataset(rows.remove_columns("solution"), form, needs_solution=False)
    check_rows([{"prompt": "a", "solution": text} for text in ("", " \n", None)], form, needs_solution=False)
    with pytest.raises(ValueError, match="row 0: `solution` is of type int"):
        check_rows([{"prompt": "a", "solution": 5}], form, needs_solution=False)


@streams
def test_a_streamed_row_is_checked_when_it_is_used(build):
    rows = [GOOD, {"prompt": [USER], "solution": " "}]
    trainer = build(rows=IterableDataset.from_generator(lambda: iter(rows * 4)), max_steps=1)
    with pytest.raises(ValueError, match=r"row \d: `solution` is empty"):
        trainer.train()


def test_no_training_set_is_refused(build):
    with pytest.raises(ValueError, match="train_dataset is None"):
        build(rows=None)


def test_the_config_of_another_trainer_is_refused(build, tmp_path):
    args = GRPOConfig(
        str(tmp_path / "out"),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        num_generations=2,
    )
    with pytest.raises(ValueError, match=r"args is a GRPOConfig; OPSD needs OPSDConfig"):
        build(args=args)


def tiny_t5():
    return T5Config(vocab_size=128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)


def test_an_encoder_decoder_is_refused_as_model_and_as_folder(build, tmp_path):
    model = T5ForConditionalGeneration(tiny_t5())
    with pytest.raises(ValueError, match=r"model: t5 is an encoder-decoder.*decoder-only"):
        build(model=model)
    model.config.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"model: t5 is an encoder-decoder"):
        build(model=str(tmp_path / "t5"))


def test_a_model_that_reads_images_is_refused(build, tmp_path):
    config = Gemma3Config()
    with pytest.raises(ValueError, match=r"model: gemma3 reads images.*text-only"):
        check_model_config(config)
    config.save_pretrained(tmp_path / "gemma3")
    with pytest.raises(ValueError, match="model: gemma3 reads images"):
        build(model=str(tmp_path / "gemma3"))


def test_a_text_model_passes():
    check_model_config(Qwen3Config())


def test_a_head_that_disagrees_with_the_config_is_refused(build, make_model):
    model = make_model()
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size + 3, bias=False)
    with pytest.raises(ValueError, match=rf"head has {model.config.vocab_size + 3} rows but config.vocab_size is"):
        build(model=model)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(build, make_model, tokenizer):
    larger = build_tokenizer()
    larger.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=rf"tokenizer has {len(larger)} tokens but the model only {len(tokenizer)}"):
        build(processing_class=larger)


@pytest.mark.parametrize(
    ("head_rows", "num_tokens", "told"),
    [
        (9, 5, "9 rows but config.vocab_size is 10"),
        (11, 5, "11 rows"),
        (10, 11, "11 tokens but the model only 10"),
    ],
)
def test_the_vocabulary_check_names_both_numbers(head_rows, num_tokens, told):
    with pytest.raises(ValueError, match=told):
        check_vocabulary(Qwen3Config(vocab_size=10), head_rows, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 9, 10])
def test_padding_rows_behind_the_tokens_are_fine(num_tokens):
    check_vocabulary(Qwen3Config(vocab_size=10), 10, num_tokens)


def with_template(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no system turn here') }}", "no system turn here"),
        ("{% if enable_thinking %}{{ raise_exception('cannot think') }}{% endif %}x", "cannot think"),
        (None, "chat template"),
    ],
    ids=["student", "teacher", "none"],
)
def test_a_chat_template_that_refuses_is_reported_before_training(build, template, told):
    with pytest.raises(ValueError, match=rf"chat template refused.*{told}.*chat_template_kwargs"):
        build(processing_class=with_template(template))


def test_a_plain_prompt_needs_no_chat_template(build):
    build(rows=Dataset.from_list([{"prompt": "2+3=", "solution": "5"}]), processing_class=with_template(None))


def test_a_budget_that_leaves_nothing_is_refused_before_training(build):
    with pytest.raises(ValueError, match=r"max_teacher_prompt_length=20 leaves nothing of the solution"):
        build(max_teacher_prompt_length=20)


@pytest.mark.parametrize("place", [0, 5])
def test_one_problem_too_long_for_the_budget_is_refused_before_training(build, dataset, place):
    long = [dict(row) for row in dataset]
    long[place]["prompt"] = [{"role": "user", "content": "9" * 900}]
    with pytest.raises(ValueError, match=r"max_teacher_prompt_length=800 leaves nothing"):
        build(rows=Dataset.from_list(long), max_teacher_prompt_length=800)


def test_a_budget_is_checked_on_every_row_before_training(make_model, make_args, tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "1+1=?"}], "solution": "\\boxed{2}"} for _ in range(8)]
    rows[5]["prompt"][0]["content"] = "1" * 300
    with pytest.raises(ValueError, match="max_teacher_prompt_length=1100 leaves nothing"):
        OPSDTrainer(
            model=make_model(),
            args=make_args(max_teacher_prompt_length=1100, teacher_prompt_template="x" * 700 + TEACHER_PROMPT_TEMPLATE),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def engine_state(**settings):
    plugin = types.SimpleNamespace(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    vars(plugin).update({key: value for key, value in settings.items() if key != "parallelism_config"})
    return types.SimpleNamespace(fsdp_plugin=plugin, parallelism_config=settings.get("parallelism_config"))


def test_fsdp2_with_whole_state_dicts_and_no_engine_at_all_are_fine():
    check_engine(engine_state())
    check_engine(types.SimpleNamespace())


def test_fsdp1_is_refused_because_it_flattens_parameters():
    with pytest.raises(ValueError, match=r"fsdp_version=1.*Set fsdp_version: 2"):
        check_engine(engine_state(fsdp_version=1))


def test_adapters_that_could_not_be_read_again_are_refused():
    state = engine_state()
    state.fsdp_plugin.activation_checkpointing = True
    check_engine(state)
    with pytest.raises(ValueError, match=r"fsdp_activation_checkpointing: true.*gradient_checkpointing to true"):
        check_engine(state, adapters=True)


def test_engines_that_would_shard_a_base_of_four_bits_are_refused():
    zero = [types.SimpleNamespace(deepspeed_plugin=types.SimpleNamespace(zero_stage=stage)) for stage in (2, 3)]
    check_engine(zero[0], quantized=True)
    check_engine(engine_state())
    for state in (zero[1], engine_state()):
        with pytest.raises(ValueError, match=r"its base has 4 or 8 bits .* Set ddp or zero2"):
            check_engine(state, quantized=True)


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_split_sequences_and_heads_are_refused(name):
    parallelism = types.SimpleNamespace(**{name: 2})
    with pytest.raises(ValueError, match=rf"{name}=2.*Set {name} to 1"):
        check_engine(engine_state(parallelism_config=parallelism))


def test_sharded_state_dicts_warn_that_save_model_writes_nothing():
    with pytest.warns(UserWarning, match="SHARDED_STATE_DICT.*FULL_STATE_DICT"):
        check_engine(engine_state(state_dict_type="StateDictType.SHARDED_STATE_DICT"))
