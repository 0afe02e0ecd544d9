# SPDX-License-Identifier: Apache-2.0
"""The teacher's prompt in token ids: the tokenizer's own rendering, within budget, the template whole."""

import copy
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_opsd.demo.tokenizer import CHAT_TEMPLATE
from trl_opsd.rows.texts import fill_template
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.teacher.prompts import TeacherCollator, left_pad, positions_from_mask, shorten_text, token_ends

CUT = " [...] "
TEMPLATES = {"teacher": "Q: {prompt}\nR: {solution}\nEnd.", "reference": "R: {solution}\nEnd."}
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3=?"}]
SOLUTION = "first we add 2 and 3, then we look at the sum, and so the answer is \\boxed{5}"
UNICODE = "Ünïcödé 數學題目 🙂🙃👩‍👧 ∑∫√ e\u0301 " * 6


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level BPE as most models have it: one character outside ASCII is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=285,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the sum and the answer", "Be brief.", "add the two"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(params=["characters", "byte-bpe"])
def any_tokenizer(request, tokenizer, byte_tokenizer):
    return tokenizer if request.param == "characters" else byte_tokenizer


def collator(tokenizer, **settings):
    defaults = {"student_kwargs": {"enable_thinking": False}, "teacher_kwargs": {"enable_thinking": True}}
    return TeacherCollator(tokenizer, TEMPLATES, **{**defaults, **settings})


def rendered(tokenizer, prompt, **kwargs):
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def teacher(solution, template="teacher"):
    return TeacherContext(template, solution, anchor=1.0)


def test_the_ids_are_the_chat_templates_with_the_teachers_arguments(any_tokenizer):
    encoded = collator(any_tokenizer).encode(PROMPT, teacher(SOLUTION))
    text = fill_template(TEMPLATES["teacher"], prompt="2+3=?", solution=SOLUTION)
    prompt = [PROMPT[0], {"role": "user", "content": text}]
    assert encoded.ids == rendered(any_tokenizer, prompt, enable_thinking=True)
    assert encoded.ids != rendered(any_tokenizer, prompt, enable_thinking=False)
    assert not encoded.shortened


def test_a_plain_context_is_the_students_own_prompt(any_tokenizer):
    encoded = collator(any_tokenizer, prefix="hm", max_length=3).encode(PROMPT, TeacherContext("plain", None))
    assert encoded.ids == rendered(any_tokenizer, PROMPT, enable_thinking=False)


def test_a_reference_context_hides_the_problem(any_tokenizer):
    encoded = collator(any_tokenizer).encode(PROMPT, teacher("7 is it", "reference"))
    text = any_tokenizer.decode(encoded.ids)
    assert "7 is it" in text and "2+3=?" not in text and "Be brief." in text


def test_a_plain_text_prompt_is_tokenised_without_a_chat_template(any_tokenizer):
    encoded = collator(any_tokenizer).encode("2+3=?", teacher("it is 5"))
    assert encoded.ids == any_tokenizer("Q: 2+3=?\nR: it is 5\nEnd.")["input_ids"]


def test_a_prefix_opens_the_teachers_turn(any_tokenizer):
    bare = collator(any_tokenizer).encode(PROMPT, teacher(SOLUTION)).ids
    opened = collator(any_tokenizer, prefix="<think>\nok").encode(PROMPT, teacher(SOLUTION)).ids
    assert opened == bare + any_tokenizer("<think>\nok", add_special_tokens=False)["input_ids"]


def test_other_arguments_of_the_render_reach_the_chat_template(any_tokenizer):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ flag }}"
    made = collator(any_tokenizer, render_kwargs={"chat_template": template}, teacher_kwargs={"flag": "on"})
    assert any_tokenizer.decode(made.encode(PROMPT, teacher("5")).ids).endswith("R: 5\nEnd.]on")


def whole_length(made, solution):
    return len(made.encode(PROMPT, teacher(solution)).ids)


@pytest.mark.parametrize("solution", [SOLUTION, UNICODE, "a" * 200], ids=["text", "unicode", "run"])
@pytest.mark.parametrize("missing", [1, 5, 20, 40])
def test_a_long_solution_is_shortened_to_the_budget_and_the_template_stays(any_tokenizer, solution, missing):
    whole = whole_length(collator(any_tokenizer), solution)
    made = collator(any_tokenizer, max_length=whole - missing)
    encoded = made.encode(PROMPT, teacher(solution))
    assert encoded.shortened and len(encoded.ids) <= whole - missing
    empty = fill_template(TEMPLATES["teacher"], prompt="2+3=?", solution="\0")
    frame = any_tokenizer.apply_chat_template(
        [PROMPT[0], {"role": "user", "content": empty}], add_generation_prompt=True, tokenize=False
    )
    before, after = frame.split("\0")
    text = any_tokenizer.decode(encoded.ids)
    assert text.startswith(before) and text.endswith(after)
    kept = text[len(before) : len(text) - len(after)]
    head, tail = kept.split(CUT)
    reread = any_tokenizer.decode(any_tokenizer(solution, add_special_tokens=False)["input_ids"])
    assert "\ufffd" not in kept  # what half a character decodes to
    assert reread.startswith(head) and reread.endswith(tail)
    assert head and tail


@pytest.mark.parametrize("solution", [SOLUTION, UNICODE, "a" * 200], ids=["text", "unicode", "run"])
def test_as_much_of_the_solution_stays_as_fits(any_tokenizer, solution):
    whole = whole_length(collator(any_tokenizer), solution)
    ends = token_ends(any_tokenizer, solution)
    for limit in range(whole - 30, whole, 7):
        made = collator(any_tokenizer, max_length=limit)
        lengths = {
            len(made._privileged_ids(PROMPT, "teacher", shorten_text(solution, ends, kept)))
            for kept in range(len(ends) + 1)
        }
        best = max(length for length in lengths if length <= limit)
        assert len(made.encode(PROMPT, teacher(solution)).ids) == best


def test_a_solution_within_the_budget_is_untouched(any_tokenizer):
    whole = whole_length(collator(any_tokenizer), SOLUTION)
    exact = collator(any_tokenizer, max_length=whole).encode(PROMPT, teacher(SOLUTION))
    assert exact == collator(any_tokenizer).encode(PROMPT, teacher(SOLUTION))
    assert not exact.shortened


def test_the_budget_counts_the_teachers_prefix(any_tokenizer):
    made = collator(any_tokenizer, prefix="<think>\nok")
    limit = whole_length(made, SOLUTION) - 1
    encoded = collator(any_tokenizer, prefix="<think>\nok", max_length=limit).encode(PROMPT, teacher(SOLUTION))
    assert encoded.shortened and len(encoded.ids) <= limit
    assert any_tokenizer.decode(encoded.ids).endswith("<think>\nok")


def test_a_budget_that_leaves_nothing_is_refused_with_the_length_that_would_do(any_tokenizer):
    needed = len(collator(any_tokenizer)._privileged_ids(PROMPT, "teacher", CUT)) + 1
    collator(any_tokenizer, max_length=needed).check_budget(PROMPT, "teacher")
    assert len(collator(any_tokenizer, max_length=needed).encode(PROMPT, teacher(SOLUTION)).ids) <= needed
    small = collator(any_tokenizer, max_length=needed - 1)
    for refused in (
        lambda: small.check_budget(PROMPT, "teacher"),
        lambda: small.encode(PROMPT, teacher(SOLUTION)),
    ):
        with pytest.raises(ValueError, match=rf"max_teacher_prompt_length={needed - 1} .*take {needed} tokens"):
            refused()


def test_no_budget_accepts_everything(any_tokenizer):
    collator(any_tokenizer).check_budget(PROMPT, "teacher")
    assert not collator(any_tokenizer).encode(PROMPT, teacher(UNICODE * 50)).shortened


def test_a_chat_template_that_refuses_is_reported_with_its_arguments(byte_tokenizer):
    refusing = "{{ raise_exception('no system turn') }}"
    made = collator(byte_tokenizer, render_kwargs={"chat_template": refusing})
    with pytest.raises(ValueError, match=r"refused .*'enable_thinking': False.*no system turn.*chat_template_kwargs"):
        made.check_renders(PROMPT)


def test_both_renders_are_checked(byte_tokenizer):
    teacher_only = "{% if enable_thinking %}{{ raise_exception('no thinking') }}{% endif %}{{ messages[-1].content }}"
    made = collator(byte_tokenizer, render_kwargs={"chat_template": teacher_only})
    with pytest.raises(ValueError, match=r"'enable_thinking': True.*no thinking"):
        made.check_renders(PROMPT)


@pytest.mark.parametrize("text", ["abcdefgh", "añb數c🙂d", ""])
def test_a_cut_falls_between_the_tokens_that_are_kept(text):
    ends = list(range(1, len(text) + 1))
    for kept in range(len(text) + 1):
        head, tail = shorten_text(text, ends, kept).split(CUT)
        assert len(head) + len(tail) == kept
        assert text.startswith(head) and text.endswith(tail)
        assert len(tail) == kept // 2


def test_a_slow_tokenizer_is_cut_between_characters():
    assert token_ends(object(), "a🙂b") == [1, 2, 3]


def test_left_padding_keeps_the_ids_at_the_end():
    ids, mask = left_pad([[5, 6, 7], [8], []], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_padding_token_inside_a_sequence_is_a_token():
    ids, mask = left_pad([[9, 5], [5]], pad_id=9)
    assert mask.tolist() == [[1, 1], [0, 1]] and ids.tolist() == [[9, 5], [9, 5]]


def test_positions_count_tokens_alone():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_a_system_message_that_the_template_refuses_is_told_to_move(tokenizer):
    """As Gemma 2's template does."""
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[-1].content }}"
    collator = TeacherCollator(refusing, {"teacher": "{prompt}{solution}"})
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+3=?"}]
    with pytest.raises(ValueError, match=r"System role not supported.*move its text into the user message"):
        collator.check_renders(turns)
    refusing.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError) as raised:
        collator.check_renders(turns[1:])
    assert "system message" not in str(raised.value)


def test_a_chat_template_that_leaves_the_text_out_is_refused(byte_tokenizer):
    of_parts = "{% for m in messages %}<|im_start|>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    made = collator(byte_tokenizer, render_kwargs={"chat_template": of_parts})
    with pytest.raises(ValueError, match=r"without its text.*list of parts"):
        made.check_renders(PROMPT)


def test_a_contexts_opening_stands_in_the_teachers_turn_behind_the_prefix_and_within_the_budget(any_tokenizer):
    bare = collator(any_tokenizer).encode(PROMPT, teacher(SOLUTION)).ids
    made, view = collator(any_tokenizer, prefix="ok "), replace(teacher(SOLUTION), opening="so add {prompt}")
    behind = [any_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ok ", "so add {prompt}")]
    assert made.encode(PROMPT, view).ids == bare + behind[0] + behind[1]
    made.max_length = len(bare) + len(behind[0] + behind[1]) - 2
    short = made.encode(PROMPT, view)
    assert short.shortened and len(short.ids) <= made.max_length and short.ids[-len(behind[1]) :] == behind[1]
    with pytest.raises(ValueError, match="spells out '<|im_end|>'".replace("|", r"\|")):
        made.encode(PROMPT, replace(view, opening="so <|im_end|>"))
