# SPDX-License-Identifier: Apache-2.0
"""The baselines train on the same rows with the same prompt as the methods."""

import json

import pytest

from trl_opsd.commands.train import main, parse
from trl_opsd.demo import build_rows, model_path
from trl_opsd.demo.tokenizer import build_tokenizer
from trl_opsd.evaluation.sampling import render_prompt
from trl_opsd.trainers.baselines import SFTBaselineConfig, end_of_turn, sft_row

OFF = {"enable_thinking": False}
TEMPLATE = "{prompt} Box it."
ROWS = build_rows("train", 8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def settings(**changes):
    return SFTBaselineConfig("out", bf16=False, use_cpu=True, report_to="none", **changes)


def asked(row, template="{prompt}"):
    return [{"role": "user", "content": template.format(prompt=row["prompt"][0]["content"])}]


@pytest.mark.parametrize("kwargs", [OFF, {"enable_thinking": True}, None])
def test_sft_reads_the_prompt_as_it_is_sampled_from_and_learns_the_solution_to_its_end(tokenizer, kwargs):
    row = sft_row(ROWS[0], tokenizer, settings(chat_template_kwargs=kwargs, prompt_template=TEMPLATE))
    prompt = render_prompt(tokenizer, asked(ROWS[0], TEMPLATE), kwargs)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["completion_mask"] == [0] * len(prompt) + [1] * (len(row["input_ids"]) - len(prompt))
    learned = row["input_ids"][len(prompt) :]
    assert learned[-1] == tokenizer.eos_token_id and tokenizer.decode(learned[:-1]) == ROWS[0]["solution"]


def test_a_prompt_that_is_text_is_followed_by_the_solution(tokenizer):
    row = sft_row({"prompt": "1+1=", "solution": "2"}, tokenizer, settings())
    assert tokenizer.decode(row["input_ids"]) == "1+1=2<|im_end|>" and row["completion_mask"] == [0, 0, 0, 0, 1, 1]


def test_a_template_that_ends_a_turn_by_no_token_gets_the_one_that_ends_sampling(tokenizer):
    assert end_of_turn(tokenizer, OFF) == [tokenizer.eos_token_id]
    plain = build_tokenizer()
    plain.chat_template = "{% for turn in messages %}{{ turn.content }}\n{% endfor %}"
    assert plain.decode(end_of_turn(plain, {})) == "\n<|im_end|>"


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_baseline_has_the_methods_prompt_unless_told_otherwise(name, tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu=true", "--bf16=false"]
    assert parse(name, words)[1].chat_template_kwargs == parse("opsd", words)[1].chat_template_kwargs == OFF
    told = parse(name, [*words, '--chat_template_kwargs={"enable_thinking": true}'])[1]
    assert told.chat_template_kwargs == {"enable_thinking": True}
    with pytest.raises(ValueError, match="prompt_template"):
        parse(name, [*words, "--prompt_template", "no slot"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_baseline_trains_on_the_prompt_of_the_methods(name, tmp_path, tokenizer, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [f"--model_name_or_path={model_path()}", f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}"]
    words += ["--max_steps=1", "--per_device_train_batch_size=8", "--use_cpu=true", "--bf16=false", "--report_to=none"]
    words += ["--logging_steps=1", f"--prompt_template={TEMPLATE}"]
    trainer = main(name, [*words, *(["--max_completion_length=4"] if name == "grpo" else [])])
    prompt = render_prompt(tokenizer, asked(ROWS[0], TEMPLATE), OFF)
    row = trainer.train_dataset[0]
    if name == "sft":
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt) and row["labels"][len(prompt)] >= 0
    else:
        assert row["prompt"] == asked(ROWS[0], TEMPLATE) and trainer.chat_template_kwargs == OFF
    assert "step 1/1  loss " in capsys.readouterr().out
