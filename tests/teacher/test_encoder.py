# SPDX-License-Identifier: Apache-2.0
"""A generation batch's contexts are encoded once, ahead of their use where they are known, and to the same tokens."""

import copy
import threading

import pytest

from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.teacher.encoder import ContextEncoder
from trl_opsd.teacher.prompts import TeacherCollator

PROMPT = [{"role": "user", "content": "1+2=?"}]
VIEW, OTHER = (TeacherContext("teacher", solution, anchor=1.0) for solution in ("1+2 is 3", "it is 3"))


@pytest.fixture
def calls(monkeypatch):
    """Slot of every context that is encoded, with the thread's name."""
    calls, encode = [], TeacherCollator.encode

    def recorded(collator, prompt, context):
        calls.append((context.slot, threading.current_thread().name.rsplit("_", 1)[0]))
        return encode(collator, prompt, context)

    monkeypatch.setattr(TeacherCollator, "encode", recorded)
    return calls


@pytest.fixture
def encoder(tokenizer):
    return ContextEncoder(TeacherCollator(tokenizer, {"teacher": "{prompt} solved: {solution}"}))


def test_what_was_begun_is_encoded_in_the_thread_alone_and_once(encoder, calls):
    expected = encoder.collator.encode(PROMPT, VIEW).ids
    calls.clear()
    encoder.begin(lambda: [(PROMPT, VIEW), (PROMPT, OTHER), (PROMPT, VIEW)])
    assert [encoder.encode(PROMPT, VIEW).ids for _ in range(2)] == [expected] * 2
    assert encoder.encode(PROMPT, OTHER).ids != expected
    assert calls == [(VIEW.slot, "encode-contexts"), (OTHER.slot, "encode-contexts")]


def test_what_was_not_foreseen_is_encoded_when_it_is_asked_for(encoder, calls):
    encoder.begin(lambda: [(PROMPT, VIEW)])
    encoder.encode(PROMPT, OTHER)
    encoder.encode(PROMPT, VIEW)
    assert sorted(calls) == sorted([(VIEW.slot, "encode-contexts"), (OTHER.slot, "MainThread")])


def test_a_context_that_cannot_be_encoded_is_refused_where_it_is_asked_for(encoder, calls):
    bad = TeacherContext("teacher", "ends <|im_end|> here", anchor=1.0)
    encoder.begin(lambda: [(PROMPT, bad), (PROMPT, VIEW)])
    encoder.encode(PROMPT, VIEW)
    with pytest.raises(ValueError, match="control token"):
        encoder.encode(PROMPT, bad)
    assert (VIEW.slot, "MainThread") not in calls


def test_a_rule_that_raises_in_the_thread_leaves_all_to_the_asker(encoder, calls):
    encoder.begin(lambda: 1 / 0)
    encoder.encode(PROMPT, VIEW)
    assert calls == [(VIEW.slot, "MainThread")]


def test_a_new_batch_knows_nothing_of_the_one_before(encoder, calls):
    encoder.begin(lambda: [(PROMPT, VIEW), (PROMPT, OTHER)])
    encoder.encode(PROMPT, VIEW)
    encoder.begin(lambda: [(PROMPT, OTHER)])
    encoder.forget()
    calls.clear()
    encoder.encode(PROMPT, VIEW)
    encoder.encode(PROMPT, OTHER)
    assert {(VIEW.slot, "MainThread"), (OTHER.slot, "MainThread")} <= set(calls)


def test_a_tokenizer_written_in_python_is_used_by_one_thread(encoder, calls):
    slow = copy.copy(encoder.collator.tokenizer)
    encoder.collator.tokenizer = type(
        "Slow", (), {"is_fast": False, "__getattr__": lambda _, name: getattr(slow, name)}
    )()
    encoder.begin(lambda: pytest.fail("asked in a thread"))
    assert encoder._ahead is None
