# SPDX-License-Identifier: Apache-2.0
"""Text that a model or a dataset may hold costs time in proportion to its length, and is read as by the plain rule."""

import random
import re
import time
from types import SimpleNamespace

import pytest

from trl_opsd.card import redact
from trl_opsd.inspect.text import marker_flags
from trl_opsd.methods import ogls_sd
from trl_opsd.monitoring.markers import count_markers
from trl_opsd.monitoring.repetition import count_repeated
from trl_opsd.rows.checks import without_special_tokens
from trl_opsd.rows.formats import from_dapo, from_gsm8k, from_openthoughts
from trl_opsd.rows.texts import without_blocks
from trl_opsd.rows.token_texts import token_texts
from trl_opsd.teacher.contexts import Moment, Rollout

SPECIAL = ("<|im_end|>", "<|im_start|>")
MARKERS = ("wait", "maybe")


class BrokenBytes:
    """A tokenizer none of whose tokens is a whole character."""

    def decode(self, ids, **kwargs):
        return bytes(ids).decode("utf-8", errors="replace")


def gsm8k(answer):
    return from_gsm8k({"question": "q", "answer": answer})


def openthoughts(answer):
    return from_openthoughts({"conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": answer}]})


def dapo(problem):
    return from_dapo({"prompt": [{"role": "user", "content": problem}], "reward_model": {"ground_truth": "1"}})


def strip_thinking(text):
    group = [Rollout("q", None, "right", 1.0), Rollout("q", None, text, 0.0)]
    choices = {"reward_threshold": 0.5, "steering_teacher": "steered"}
    limits = {"max_contexts_per_pool": None, "max_rollout_context_length": None, "strip_thinking": True}
    return ogls_sd.steering_contexts(group, SimpleNamespace(**choices, **limits), Moment(random.Random(0)))


# What reads text -> from a size to a hostile text of about that many pieces.
HOSTILE = {
    "strip_thinking": (strip_thinking, lambda size: "<think>" * size),
    "strip_thinking, closed": (strip_thinking, lambda size: "<think>" * size + "</think>" * size),
    "gsm8k": (gsm8k, lambda size: "<<" * size + "#### 1"),
    "openthoughts": (openthoughts, lambda size: "<think>" * size + "<|begin_of_solution|>" * size),
    "dapo": (dapo, lambda size: "Solve the following math problem step by step." + "\n\nRemember to put " * size),
    "markers": (count_markers, lambda size: "wai" * size + " wait" * size),
    "flags of tokens": (lambda texts: marker_flags(texts, MARKERS), lambda size: [" wait"] * size),
    "texts of tokens": (lambda ids: token_texts(BrokenBytes(), ids), lambda size: [0x80] * size),
    "repetition": (count_repeated, lambda size: [[7] * size]),
    "control tokens": (
        lambda text: without_special_tokens(text, SPECIAL),
        lambda size: "<|im_" * size + "<|im_end|>" + "end|>" * size,
    ),
    "token of the Hub": (redact, lambda size: "hf_" * size + "hf_abc" * size),
}


def seconds(read, text):
    """The least processor time of several: what a busy machine adds is no cost of the text's."""
    times = []
    for _ in range(3):
        start = time.process_time()
        read(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("name", HOSTILE)
def test_eight_times_the_text_takes_about_eight_times_as_long(name):
    read, make = HOSTILE[name]
    small, large = make(1_000), make(8_000)
    # Quadratic work takes 64 times as long, and here seconds; less than a fifth of one is not told from noise.
    assert seconds(read, large) < max(0.2, 24 * seconds(read, small))


def texts_of(pieces, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(pieces, k=draw.randint(0, 12))) for _ in range(2_000)]


@pytest.mark.parametrize(
    ("opening", "closing", "pieces"),
    [("<think>", r"</think>\s*", ("<think>", "</think>", "a", "\n", " ")), ("<<", ">>", ("<<", ">>", "<", ">", "1"))],
)
def test_blocks_are_those_of_the_lazy_expression(opening, closing, pieces):
    for text in texts_of(pieces):
        assert without_blocks(text, opening, closing) == re.sub(f"{opening}.*?{closing}", "", text, flags=re.DOTALL)


def test_a_calculator_mark_ends_on_its_line():
    assert gsm8k("1 << 2\n3 >> 4 <<5=5>>5\n#### 6")["solution"] == "1 << 2\n3 >> 4 5\n\\boxed{6}"


def test_no_control_token_is_left_however_they_stand_within_each_other():
    for text in texts_of(("<|im_end|>", "<|im_", "end|>", "start|>", "<|", "|>", "a")):
        expected, before = text, None
        while expected != before:
            before, expected = expected, re.sub("|".join(map(re.escape, SPECIAL)), "", expected)
        assert without_special_tokens(text, SPECIAL) == expected
    assert without_special_tokens("a" * 3 + "<s" + "<s>" * 2 + ">b", ("<s>",)) == "aaab"
    assert without_special_tokens("xaxx", ("x",)) == "a"


def test_bytes_that_make_no_character_are_shown_and_end():
    texts = token_texts(BrokenBytes(), [0x80] * 100 + list("ok \u4e2d".encode()))
    assert "".join(texts) == "\ufffd" * 100 + "ok \u4e2d" and texts[-1] == "\u4e2d"


def test_each_rollout_is_stripped_once_however_many_are_wrong(monkeypatch):
    calls = []
    monkeypatch.setattr(ogls_sd, "without_blocks", lambda text, *marks: calls.append(text) or text)
    group = [Rollout("q", None, f"text {index}", float(index < 2)) for index in range(8)]
    choices = {"reward_threshold": 0.5, "steering_teacher": "steered"}
    limits = {"max_contexts_per_pool": None, "max_rollout_context_length": None, "strip_thinking": True}
    ogls_sd.steering_contexts(group, SimpleNamespace(**choices, **limits), Moment(random.Random(0)))
    assert sorted(calls) == [f"text {index}" for index in range(8)]
