# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers and chat templates: what student and teacher read in every thinking mode, and where a rollout begins."""

import re
from pathlib import Path

import pytest
import trl

from trl_opsd import OPSDConfig
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.teacher.prompts import TeacherCollator

QUESTION, SOLUTION, ANSWER = "What is 17+25?", "Seventeen and twenty-five are forty-two.", "It is 42."
PROMPT = [{"role": "user", "content": QUESTION}]
TOKENIZERS = {name: "3.7.2" for name in ("qwen3", "qwen2_5", "llama3_1", "llama3_2", "gemma3", "deepseek_v3")}
TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
MODES = ({"enable_thinking": True}, {"enable_thinking": False}, {})

# Templates that cannot be used as they are, by the reason that a run is refused with.
REFUSED = {
    "idefics3": "without its text",
    "smolvlm": "without its text",
    "llava_next": "without its text|refused",
    "llama3": "bos_token",  # which Qwen3's tokenizer, that stands in here, does not have
}
# Which refuse a system message; the error says to move its text.
WITHOUT_SYSTEM = {"gemma"}
# Which open a think block in the prompt: a conversation with an answer is rendered otherwise, so a rollout holds the thoughts'
# end and not their beginning.
# What a template writes between its own opening and the answer: a rollout holds it, or the model's other choice.
PREAMBLES = {
    "qwen3": "<think>\n\n</think>",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": "to=user<|message|>",
}
OPENS_THOUGHTS = re.compile(r"<think>\s*\Z")


def name_of(path):
    return path.stem.removesuffix("_training")


@pytest.fixture(params=[*TOKENIZERS, *TEMPLATES], ids=lambda each: each if isinstance(each, str) else each.stem)
def case(request, npm_tokenizer, monkeypatch):
    """A tokenizer, with its own template or with one of TRL's, and the template's name."""
    if isinstance(request.param, str):
        return npm_tokenizer(request.param, TOKENIZERS[request.param]), request.param
    tokenizer = npm_tokenizer("qwen3", TOKENIZERS["qwen3"])
    monkeypatch.setattr(tokenizer, "chat_template", request.param.read_text(encoding="utf-8"))
    return tokenizer, name_of(request.param)


def collator_of(tokenizer, mode):
    args = OPSDConfig("unused", bf16=False, chat_template_kwargs=mode, teacher_chat_template_kwargs=mode)
    return TeacherCollator.from_settings(tokenizer, args)


def test_every_view_holds_what_it_is_to_read_and_nothing_else(case):
    tokenizer, name = case
    for mode in MODES:
        collator = collator_of(tokenizer, mode)
        try:
            collator.check_renders(PROMPT)
        except ValueError as error:
            assert name in REFUSED and re.search(REFUSED[name], str(error)), str(error)
            continue
        views = [
            TeacherContext("plain", None),
            TeacherContext("teacher", SOLUTION),
            TeacherContext("reference", SOLUTION),
        ]
        texts = [tokenizer.decode(collator.encode(PROMPT, view).ids) for view in views]
        shown = [(QUESTION in text, SOLUTION in text) for text in texts]
        assert shown == [(True, False), (True, True), (False, True)], (mode, shown)


def test_a_rollout_begins_where_the_template_puts_an_answer(case):
    tokenizer, name = case
    for mode in () if name in REFUSED else MODES:
        prompt = collator_of(tokenizer, mode).encode(PROMPT, TeacherContext("plain", None)).ids
        turns = [*PROMPT, {"role": "assistant", "content": ANSWER}]
        whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **mode)["input_ids"]
        begins = tokenizer.decode(prompt)
        same = list(whole[: len(prompt)]) == prompt
        after = tokenizer.decode(whole[len(prompt) :]).lstrip().removeprefix(PREAMBLES.get(name, "")).lstrip()
        opens = OPENS_THOUGHTS.search(begins) or (name == "glm4moe" and not begins.endswith("</think>"))
        assert bool(same) != bool(opens), (mode, begins[-40:])
        assert opens or after.startswith(ANSWER), (mode, after[:40])


def test_a_system_message_is_read_or_refused_with_what_to_do(case):
    tokenizer, name = case
    prompt = [{"role": "system", "content": "Answer in one word."}, *PROMPT]
    try:
        ids = collator_of(tokenizer, {}).encode(prompt, TeacherContext("teacher", SOLUTION)).ids
    except ValueError as error:
        assert name in WITHOUT_SYSTEM | set(REFUSED)
        assert name in REFUSED or "move its text into the user message" in str(error)
        return
    assert name in REFUSED or "Answer in one word." in tokenizer.decode(ids)
