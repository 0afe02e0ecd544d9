# SPDX-License-Identifier: Apache-2.0
"""The demo's tokenizer and chat template."""

import random

import pytest

from trl_opsd.demo.corpus import draw_example
from trl_opsd.demo.tokenizer import SPECIAL_TOKENS, WORD_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_printable_text_survives_the_round_trip(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n await wait, the user's\n\n\\boxed{12} <think>3+4=7</think>  end "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("é")) == "<|unk|>"


def test_words_are_single_tokens(tokenizer):
    for word in (*SPECIAL_TOKENS, *WORD_TOKENS):
        assert len(tokenizer.encode(word)) == 1, word


def test_special_tokens_leave_the_text_and_think_marks_stay(tokenizer):
    ids = tokenizer.encode("<think>1+1=2\n</think>\n\\boxed{2}<|im_end|><|pad|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1+1=2\n</think>\n\\boxed{2}"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|pad|>"


def test_the_template_has_qwen3s_thinking_switch(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1=?"}]
    turns = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1+1=?<|im_end|>\n"
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == turns
    on = render(messages, tokenize=False, add_generation_prompt=True)
    assert on == render(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert on == turns + "<|im_start|>assistant\n"
    off = render(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert off == on + "<think></think>\n"


def test_a_prompts_ids_are_a_prefix_of_the_conversations(tokenizer):
    generator = random.Random(0)
    for _ in range(50):
        example = draw_example(generator)
        answer = "".join(text for text, _ in example.pieces)
        messages = [{"role": "user", "content": example.user}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        messages.append({"role": "assistant", "content": answer})
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt) :] == tokenizer.encode(answer + "<|im_end|>\n")


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "((3+4)-2)*2=?\n[reference]\nwait \\boxed{10}\n[end]"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
